"""Responses of the next steps, asked for while the policy is updated.

With `ahead` = n those of step s are drawn with the weights of s - 1 - n steps (0 at first). At step t, once the sampler
has the weights of t - 1 steps, step t + n is asked for, then step t is waited for: the staleness is n at any speed.
A checkpoint waits for what was asked for and holds it, since its weights are gone when the run resumes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np

from gvpo_core.training.policy import Batch, Policy, Response
from gvpo_core.training.policy.ranks import attempt, gather_objects, highest
from gvpo_core.training.rollout import Requests
from gvpo_core.training.samplers import Drawn, Sampler, SamplerError, Text
from gvpo_core.training.samplers.background import Asks
from gvpo_core.training.samplers.gaps import GapCheck
from gvpo_core.training.samplers.protocol import OTHER_WEIGHTS, Given, Stopped, asked_with
from gvpo_core.training.sampling import Sampling

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Text, Drawn, Response)}  # a subclass before its base
_PROBE_TOKENS = 16
_PROBES = 8  # responses, where their mean is compared: in 16 bits a single one may be far off


@dataclass
class _Ready:
    """A sampler that gives what was drawn before; asked once more, it draws with the weights of now."""

    drawn: Callable[[], Given]
    sampler: Sampler
    failures: Sequence[str] = ()
    taken: bool = False

    def generate(
        self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> Sequence[Sequence[Response | Text]]:
        """The responses, once they are there."""
        if self.taken:  # not the responses that were asked for: their weights are gone
            drawn = self.sampler.generate(prompts, seeds, sampling)
        else:
            drawn, self.taken = self.drawn(), True
        self.failures = list(getattr(self.sampler, "failures", ()))
        return drawn

    def __getattr__(self, name: str) -> Any:
        if name in ("retry", "deadline", "stopping", "send_again", "messages"):
            return getattr(self.sampler, name)
        raise AttributeError(name)


@dataclass
class Ahead:
    """What was asked for and not yet used, by step."""

    sampler: Asks
    ahead: int
    steps: int  # of the run: no later step is asked for
    _waiting: dict[int, tuple[Requests, Callable[[], Given]]] = field(default_factory=dict)
    _restored: dict[int, dict[int, list[Response | Text]]] = field(default_factory=dict)  # step -> group -> responses
    _policy: Policy | None = None

    def ready(
        self,
        policy: Policy,
        step: int,
        requests: Callable[[int], Requests],
        sampling: Sampling,
        gaps: GapCheck | None = None,
    ) -> Sampler:
        """Asks for what is due at `step`; every rank calls, once the sampler has the weights of `step` - 1 steps.

        Args:
          requests: of this rank for a step.
          gaps: compares log-probabilities of responses that are drawn for it. None: nothing is compared.
        Returns: what waits for the responses of `step` and gives them as a sampler.
        Raises: SamplerError: the engine's weights are not the policy's; see `GapCheck`.
        """
        self._policy = policy
        due = gaps is not None and gaps.due(step)
        if gaps and due and (gaps.tolerance is not None or getattr(self.sampler, "version", None) == step - 1):
            self._probe(policy, requests(step), sampling, gaps)

        def ask() -> None:
            for later in range(step, min(step + self.ahead, self.steps) + 1):
                if later not in self._waiting:
                    self._waiting[later] = self._asked(later, requests(later), sampling)

        attempt(policy, ask, kind=SamplerError)
        ready: Any = _Ready(self._waiting.pop(step)[1], self.sampler)
        return cast(Sampler, ready)

    def _asked(self, step: int, asked: Requests, sampling: Sampling) -> tuple[Requests, Callable[[], Given]]:
        if step not in self._restored:
            given = asked_with(self.sampler, asked.prompts, asked.tokens)
            return asked, self.sampler.ask(given, asked.seeds, sampling)
        groups = self._restored.pop(step)
        known = [
            [groups[group][place] for place in places if place < len(groups.get(group, ()))]
            for group, places in asked.places.items()
        ]
        return asked, lambda: known

    def _probe(self, policy: Policy, asked: Requests, sampling: Sampling, gaps: GapCheck) -> None:
        """Compares log-probabilities of short responses with the policy's: one of each rank, or several for a mean.

        The responses of the step cannot be compared: they are of older weights.
        """
        short = Sampling(min(sampling.max_tokens, _PROBE_TOKENS), sampling.temperature)
        count = _PROBES if gaps.tolerance is None else 1
        tokens, seeds = asked.tokens[:1], [seeds[:count] for seeds in asked.seeds[:1]]
        prompts = asked_with(self.sampler, asked.prompts[:1], tokens)
        given = attempt(policy, lambda: self.sampler.probe(prompts, seeds, short), kind=SamplerError)
        rows = [(p, r) for p, many in zip(tokens, given or [], strict=True) for r in many if isinstance(r, Drawn)]
        batch = Batch([p for p, _ in rows], [r.tokens for _, r in rows], list(range(len(rows))))
        ours = policy.gather(np.asarray(policy.logprobs(batch), np.float64))
        theirs = policy.gather(np.asarray([r.logprob for _, r in rows], np.float64))
        lengths = policy.gather(np.asarray([len(r.tokens) for _, r in rows], np.int64))
        gaps.check(theirs, ours, lengths, np.zeros(len(ours)))

    def state(self) -> dict[str, Any]:
        """What was asked for and not yet used, once it is there; every rank calls.

        A run that is asked to stop while its server is away leaves out what does not come: it is asked for again.
        """
        if self._policy is None or not self._waiting:
            return {}
        drawn = {step: attempt(self._policy, partial(self._came, step), kind=SamplerError) for step in self._waiting}
        lost = [step for step, groups in drawn.items() if highest(self._policy, int(groups is None))]
        for step in lost:
            del self._waiting[step], drawn[step]
        records: list[dict[str, Any]] = []
        for step, groups in drawn.items():
            assert groups is not None  # in no step that is lost
            asked, _ = self._waiting[step]
            self._waiting[step] = asked, partial(_same, groups)
            records += [
                {"step": step, "group": group, "responses": [_record(r) for r in many]}
                for group, many in zip(asked.places, groups, strict=True)
            ]
        return {"ahead": gather_objects(self._policy, records)}

    def _came(self, step: int) -> Given | None:
        try:
            groups = self._waiting[step][1]()
        except Stopped:
            return None
        return None if getattr(self.sampler, "retry", 0) >= OTHER_WEIGHTS else groups

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what `state` returned."""
        self._waiting, self._restored = {}, {}
        for record in state.get("ahead", ()):
            groups = self._restored.setdefault(int(record["step"]), {})
            groups.setdefault(int(record["group"]), []).extend(_response(r) for r in record["responses"])


def _same(groups: Given) -> Given:
    return groups


def _record(response: Response | Text) -> dict[str, Any]:
    kind = next(name for name, kind in _KINDS.items() if isinstance(response, kind))
    return {"kind": kind} | {k: v for k, v in asdict(response).items() if v is not None and v == v}


def _response(record: Mapping[str, Any]) -> Response | Text:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k != "kind"}
    made: Response | Text = _KINDS[record["kind"]](**values)
    return made
