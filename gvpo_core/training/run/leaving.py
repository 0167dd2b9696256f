"""Abandons a step that cannot be finished after the run was asked to stop."""

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
"""Errors that all ranks raise if one does."""


@contextmanager
def leaving(policy: Policy, stop: StopRequest) -> Iterator[None]:
    """Suppresses SHARED errors, such as missing responses or scores, if the run was asked to stop.

    A scheduler that ends a job also ends the servers of its rewards. The run must still save the steps done.
    """
    try:
        yield
    except SHARED as error:
        if str(error) == STOPPED:
            return
        if not highest(policy, stop.signal):
            raise
        _log.warning("asked to stop, and this step cannot be finished: %s", str(error).partition("\n")[0])
