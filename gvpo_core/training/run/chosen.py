"""Selects a checkpoint of a run for `gvpo eval` and `gvpo export`. The run may be in progress."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gvpo_core.training.config import ConfigError
from gvpo_core.training.files.disk import refuse_special
from gvpo_core.training.run.best import best_saved
from gvpo_core.training.run.checkpoint import Checkpoint, checkpoint_at, damage, reading, steps_saved, unreadable

_TRIES = 5  # a run in progress may remove the checkpoint that was just chosen
NAMED = ("newest", "best", "initial")


@contextlib.contextmanager
def chosen(run: Path, name: str) -> Iterator[Checkpoint | None]:
    """Yields a checkpoint of a run folder. Inside `with`, a run in progress does not remove it.

    Args:
      name: a step, "newest", "best" (the saved step with the best held-out result), or "initial".
    Yields: the checkpoint; None for "initial", the model that the run began with.
    Raises: ConfigError: there is no such checkpoint, or it is damaged. CheckpointError: it cannot be read now.
    """
    with contextlib.ExitStack() as stack:
        checkpoint_used = None if name == "initial" else _opened_checkpoint(run, name, stack)
        if checkpoint_used is not None:
            try:
                reason = damage(checkpoint_used.directory)
            except OSError as e:
                raise unreadable(checkpoint_used.directory.parent, e) from e
            if reason:
                raise ConfigError(f"the checkpoint is damaged: {reason}")
        yield checkpoint_used


def refuse_unknown(run: Path, name: str) -> None:
    """Raises ConfigError: the run has no checkpoint of this name or step. CheckpointError: it cannot be read now."""
    if name != "initial":
        _step(run, name)


def _opened_checkpoint(run: Path, name: str, stack: contextlib.ExitStack) -> Checkpoint:
    for _ in range(_TRIES):
        checkpoint = checkpoint_at(run / "checkpoints", _step(run, name))
        try:
            stack.enter_context(reading(checkpoint))
        except FileNotFoundError:
            continue
        return checkpoint
    return checkpoint  # without a manifest: reported as damaged


def _step(run: Path, name: str) -> int:
    best: int | None = None
    try:
        steps = steps_saved(run / "checkpoints")
        if name == "best":
            refuse_special(run / "metrics.jsonl")
            best = best_saved(run / "metrics.jsonl", steps)
    except OSError as e:
        raise unreadable(run / "checkpoints", e) from e
    step: int | None = None
    if name == "newest":
        step = steps[0] if steps else None
    elif name == "best":
        step = best
    elif name.isascii() and name.isdigit():
        step = int(name)
    if step is None or step not in steps:
        saved = ", ".join(map(str, sorted(steps))) or "none"
        why = " with an evaluation" if name == "best" and steps else ""
        others = (
            "" if name in NAMED or name.isdigit() else f"; expected a saved step, {', '.join(NAMED[:-1])} or initial"
        )
        raise ConfigError(f"{run} has no checkpoint {name!r}{why}{others}; saved steps: {saved}")
    return step
