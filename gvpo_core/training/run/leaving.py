"""Leaves a step that cannot be finished, once the run was asked to stop."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from gvpo_core.training.improve import NoSignalError
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import highest
from gvpo_core.training.rewards.failures import RewardError
from gvpo_core.training.run.signals import StopRequest
from gvpo_core.training.samplers.protocol import STOPPED, SamplerError

_log = logging.getLogger("gvpo")
SHARED = (RewardError, SamplerError, NoSignalError)
"""Errors that every rank raises where one does."""


@contextmanager
def leaving(policy: Policy, stop: StopRequest) -> Iterator[None]:
    """Ends its block without an error where the run was asked to stop and the responses or scores do not come.

    A scheduler that ends a job ends the servers of its rewards too: what was trained so far must be saved all the same.
    """
    try:
        yield
    except SHARED as error:
        if str(error) == STOPPED:
            return
        if not highest(policy, stop.signal):
            raise
        _log.warning("asked to stop, and this step cannot be finished: %s", str(error).partition("\n")[0])
