"""Samples the teacher's own responses, as text: its tokenizer may differ from the policy's."""

from collections.abc import Sequence

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.policy import Policy, Prompt
from gvpo_core.training.samplers.protocol import Text
from gvpo_core.training.sampling import Sampling
from gvpo_core.training.teacher.load import load_teacher
from gvpo_core.training.teacher.taught import Teacher


class TeacherSampler:
    """Draws with the model of [teacher], in the run's process. The teacher is never trained, so no weights are sent.

    The policy's tokenizer tokenizes its text, as with a server.
    """

    messages = True  # the teacher has its own chat template

    def __init__(self, config: Config, policy: Policy) -> None:
        """Loads the teacher.

        Raises: ConfigError: the teacher cannot be used, or several ranks would share it.
        """
        self.teacher: Teacher = load_teacher(config, policy)
        self.failures: list[str] = []
        facts = self.teacher.facts
        assert facts is not None  # teacher.url is rejected earlier
        if policy.world_size > 1 and facts.sharding != "data_parallel":
            raise ConfigError(
                f"rollout.sampler = 'teacher' needs a complete teacher on each rank, and the {policy.world_size} ranks"
                " share one. Use torch with model.sharding = 'data_parallel', or one process"
            )

    def describe(self) -> str:
        """Describes the sampler for the header."""
        return f"the teacher, {self.teacher.describe()}"

    def generate(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Text]]:
        """Draws a response for each seed of each prompt, except if they may not fit into the teacher's context."""
        scorer, context = self.teacher.scorer, self.teacher.context
        encoded = [tuple(scorer.encode(prompt)) for prompt in prompts]
        fits = [not context or len(ids) + sampling.max_tokens <= context for ids in encoded]
        self.failures = [] if all(fits) else [f"prompt and response are longer than the teacher's context, {context}"]
        places = [i for i, fit in enumerate(fits) if fit]
        texts: list[list[Text]] = [[] for _ in prompts]
        drawn = scorer.generate([encoded[i] for i in places], [seeds[i] for i in places], sampling)  # type: ignore[attr-defined]
        for i, responses in zip(places, drawn, strict=True):
            texts[i] = [Text(scorer.decode(r.tokens), r.finished) for r in responses]  # type: ignore[attr-defined]
        return texts
