"""Collective operations over the ranks of a run."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from gvpo_core.training.policy.protocol import Policy

T = TypeVar("T")


def agree(policy: Policy, error: Exception | None, kind: type[Exception] = RuntimeError) -> None:
    """Raises on every rank if any rank has an error, so that no rank waits for one that stopped.

    Args:
      kind: type of the error on ranks that had none; its message is the same.
    """
    message = np.frombuffer((f"{error}\n" if error else "").encode("utf-8", "backslashreplace"), np.uint8)
    text = policy.gather(message).tobytes().decode().strip()
    if error:
        raise error
    if text:
        raise kind(text)


def attempt(
    policy: Policy,
    work: Callable[[], T],
    *,
    main_only: bool = False,
    catch: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError),
    kind: type[Exception] = RuntimeError,
    explain: Callable[[Exception], Exception] = lambda error: error,
) -> T | None:
    """Calls `work` on every rank, or only on the main rank, and raises on every rank if it raised on any.

    Args:
      catch: errors to share with all ranks; others are raised only where they occur.
      kind: as in `agree`.
      explain: converts an error into the one to raise.
    Returns: the result of `work`; None on a rank that did not call it.
    """
    result, error = None, None
    if policy.rank == 0 or not main_only:
        try:
            result = work()
        except catch as e:
            error = explain(e)
    agree(policy, error, kind)
    return result


def highest(policy: Policy, value: int) -> int:
    """Returns the largest value over all ranks."""
    return int(policy.gather(np.asarray([value])).max())


def gather_objects(policy: Policy, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the objects of all ranks in rank order, on every rank. They must be JSON values."""
    if policy.world_size == 1:
        return objects
    lines = "".join(json.dumps(o) + "\n" for o in objects).encode()
    gathered = policy.gather(np.frombuffer(lines, np.uint8)).tobytes().decode()
    return [json.loads(line) for line in gathered.splitlines()]
