"""Checks of the sampler: how far its log-probabilities are from the policy's, and the age of its weights."""

from collections.abc import Iterator

from gvpo_core.training.watch.checks.recent import Recent
from gvpo_core.training.watch.verdict import BAD, WATCH, Alert

GAP, LARGE_GAP = 0.05, 0.5  # nats a token, mean of a step


class SamplerChecks:
    """Alerts `sampler_gap` and `staleness`."""

    def __init__(self, ahead: int) -> None:
        """
        Args:
          ahead: steps by which the sampler's weights may be older than the policy.
        """
        self._ahead = ahead

    def alerts(self, recent: Recent) -> Iterator[Alert]:
        """The alerts after the last step of `recent`."""
        gap, start = recent.now("sampler/gap"), next(iter(recent.start["sampler/gap"]), 0.0)
        if gap > LARGE_GAP or (gap > GAP and gap > 2 * start):
            seen = f"sampler and policy differ by {gap:.2g} nats a token, {start:.2g} in the first step"
            advice = "its weights are old, or its precision differs: check engine.weights and the sampler's log"
            yield Alert("sampler_gap", BAD if gap > LARGE_GAP else WATCH, seen, advice)
        stale = recent.now("sampler/staleness/max")
        if stale > self._ahead:
            seen = (
                f"weights of sampled responses are {stale:.0f} steps behind the policy, at most {self._ahead} expected"
            )
            yield Alert("staleness", BAD, seen, "the sampler did not load the newest weights: check its log")
