"""Requests responses of the next steps while the policy is updated.

With `ahead` = n, the responses of step s are drawn with the weights after s - 1 - n steps (0 at first). At step t, once
the sampler has the weights after t - 1 steps, the run requests step t + n and then waits for step t. So the staleness
is n at any speed. A checkpoint waits for the requested responses and stores them, since the weights that they were
drawn with no longer exist when the run resumes.
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
from gvpo_core.training.samplers.protocol import OTHER_WEIGHTS, Responses, Stopped, prompts_for
from gvpo_core.training.sampling import Sampling

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Text, Drawn, Response)}  # a subclass before its base
_PROBE_TOKENS = 16
_PROBES = 8  # responses, if their mean is compared: in 16 bits, a single response may differ much


@dataclass
class _Ready:
    """A sampler that returns responses drawn before. The second call draws with the current weights."""

    drawn: Callable[[], Responses]
    sampler: Sampler
    failures: Sequence[str] = ()
    taken: bool = False

    def generate(
        self, prompts: Sequence[Any], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> Sequence[Sequence[Response | Text]]:
        """Waits for the responses and returns them."""
        if self.taken:  # not the requested responses: their weights no longer exist
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
    """Requested responses that are not used yet, by step."""

    sampler: Asks
    ahead: int
    steps: int  # of the run: no later step is requested
    _waiting: dict[int, tuple[Requests, Callable[[], Responses]]] = field(default_factory=dict)
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
        """Requests the responses due at `step`.

        Every rank calls this, once the sampler has the weights after `step` - 1 steps.

        Args:
          requests: returns this rank's requests for a step.
          gaps: compares log-probabilities of responses drawn for the comparison. None: no comparison.
        Returns: a sampler that waits for the responses of `step` and returns them.
        Raises: SamplerError: the engine's weights are not the policy's; see `GapCheck`.
        """
        self._policy = policy
        due = gaps is not None and gaps.due(step)
        if gaps and due and (gaps.tolerance is not None or getattr(self.sampler, "version", None) == step - 1):
            self._probe(policy, requests(step), sampling, gaps)

        def ask() -> None:
            for later in range(step, min(step + self.ahead, self.steps) + 1):
                if later not in self._waiting:
                    self._waiting[later] = self._request(later, requests(later), sampling)

        attempt(policy, ask, kind=SamplerError)
        ready: Any = _Ready(self._waiting.pop(step)[1], self.sampler)
        return cast(Sampler, ready)

    def _request(self, step: int, requests: Requests, sampling: Sampling) -> tuple[Requests, Callable[[], Responses]]:
        if step not in self._restored:
            prompts = prompts_for(self.sampler, requests.prompts, requests.tokens)
            return requests, self.sampler.ask(prompts, requests.seeds, sampling)
        groups = self._restored.pop(step)
        responses = [
            [groups[group][place] for place in places if place < len(groups.get(group, ()))]
            for group, places in requests.places.items()
        ]
        return requests, lambda: responses

    def _probe(self, policy: Policy, requests: Requests, sampling: Sampling, gaps: GapCheck) -> None:
        """Compares log-probabilities of short responses with the policy's: one per rank, or several for a mean.

        The responses of the step cannot be compared: they were drawn with older weights.
        """
        short = Sampling(min(sampling.max_tokens, _PROBE_TOKENS), sampling.temperature)
        count = _PROBES if gaps.tolerance is None else 1
        tokens, seeds = requests.tokens[:1], [seeds[:count] for seeds in requests.seeds[:1]]
        prompts = prompts_for(self.sampler, requests.prompts[:1], tokens)
        drawn = attempt(policy, lambda: self.sampler.probe(prompts, seeds, short), kind=SamplerError)
        rows = [(p, r) for p, many in zip(tokens, drawn or [], strict=True) for r in many if isinstance(r, Drawn)]
        batch = Batch([p for p, _ in rows], [r.tokens for _, r in rows], list(range(len(rows))))
        ours = policy.gather(np.asarray(policy.logprobs(batch), np.float64))
        theirs = policy.gather(np.asarray([r.logprob for _, r in rows], np.float64))
        lengths = policy.gather(np.asarray([len(r.tokens) for _, r in rows], np.int64))
        gaps.check(theirs, ours, lengths, np.zeros(len(ours)))

    def state(self) -> dict[str, Any]:
        """Waits for the requested responses that are not used yet, and returns them. Every rank calls this.

        If the run is asked to stop while its server is away, missing responses are left out. They are requested again
        later.
        """
        if self._policy is None or not self._waiting:
            return {}
        drawn = {step: attempt(self._policy, partial(self._arrived, step), kind=SamplerError) for step in self._waiting}
        lost = [step for step, groups in drawn.items() if highest(self._policy, int(groups is None))]
        for step in lost:
            del self._waiting[step], drawn[step]
        records: list[dict[str, Any]] = []
        for step, groups in drawn.items():
            assert groups is not None  # lost steps were removed
            requests, _ = self._waiting[step]
            self._waiting[step] = requests, partial(_same, groups)
            records += [
                {"step": step, "group": group, "responses": [_record(r) for r in many]}
                for group, many in zip(requests.places, groups, strict=True)
            ]
        return {"ahead": gather_objects(self._policy, records)}

    def _arrived(self, step: int) -> Responses | None:
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


def _same(groups: Responses) -> Responses:
    return groups


def _record(response: Response | Text) -> dict[str, Any]:
    kind = next(name for name, kind in _KINDS.items() if isinstance(response, kind))
    return {"kind": kind} | {k: v for k, v in asdict(response).items() if v is not None and v == v}


def _response(record: Mapping[str, Any]) -> Response | Text:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k != "kind"}
    response: Response | Text = _KINDS[record["kind"]](**values)
    return response
