"""Saves checkpoints: creates one, lets the policy write it, in a thread if it can, and commits it."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import attempt, gather_objects
from gvpo_core.training.policy.tensor_file import Digest
from gvpo_core.training.run.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    commit_checkpoint,
    partial_checkpoint,
    read_back,
    save_failed,
    write_state,
)
from gvpo_core.training.run.folder import RunFolder, RunFolderError

_log = logging.getLogger("gvpo.checkpoint")


class Saving:
    """Saves the checkpoints of a run. Every rank has one and must call every method except `abandon`.

    A policy with `saving` writes in a thread that waits for no other rank. `save` then returns at once, and `settle`
    waits for the thread and commits. Until then the checkpoint does not count, and the policy must not change. A policy
    without `saving` writes and commits in `save`.
    """

    def __init__(self, policy: Policy, folder: RunFolder, keep: int) -> None:
        """
        Args:
          keep: number of newest checkpoints to keep.
        """
        self.policy, self.folder, self.keep = policy, folder, keep
        self._pending: _Pending | None = None

    def save(self, step: int, state: Mapping[str, Any], also: Sequence[int]) -> None:
        """Saves the policy and the state of the source of groups as the checkpoint of a step.

        Args:
          also: steps of further checkpoints to keep.
        Raises: CheckpointError: the save failed on one rank; all ranks raise it.
        """
        self.settle()
        folder = self.folder.checkpoints
        partial = partial_checkpoint(folder, step)

        def begin() -> None:
            self.folder.confirm()
            begin_checkpoint(folder, step)

        self._attempt(step, begin, main_only=True)
        self._attempt(step, lambda: write_state(partial, state), main_only=True)
        saving = getattr(self.policy, "saving", None)
        if saving is None:
            self._attempt(step, lambda: self.policy.save(partial.policy))
            self._commit(step, also, {})
        else:
            write = self._attempt(step, lambda: saving(partial.policy))
            assert write is not None  # every rank made the call
            self._pending = _Pending(step, also, partial.policy, write)

    def settle(self) -> None:
        """Waits for the checkpoint that is being written, if any, and commits it.

        Raises: CheckpointError: the save failed on one rank; all ranks raise it.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        written = self._attempt(pending.step, pending.result) or {}
        parts = gather_objects(self.policy, [dict(written)])
        self._commit(pending.step, pending.also, {f"policy/{n}": Digest(*d) for part in parts for n, d in part.items()})

    def abandon(self) -> None:
        """Finishes a pending save after an error.

        A single process commits it. Several processes can no longer agree, so they drop it with a warning.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            if self.policy.world_size == 1:
                self.settle()
                return
        except (CheckpointError, RunFolderError) as error:
            _log.warning("%s", error)
            return
        _log.warning("the checkpoint of step %d was being written and is dropped", pending.step)

    def _commit(self, step: int, also: Sequence[int], written: Mapping[str, Digest]) -> None:
        def commit() -> None:
            self.folder.confirm()
            commit_checkpoint(self.folder.checkpoints, step, self.keep, also, written)

        self._attempt(step, commit, main_only=True)

    def _attempt(self, step: int, work: Callable[[], Any], *, main_only: bool = False) -> Any:
        return attempt(
            self.policy,
            work,
            main_only=main_only,
            catch=(Exception,),  # each framework's writer has its own error for a full disk
            kind=CheckpointError,
            explain=lambda error: self._unsaved(step, error),
        )

    def _unsaved(self, step: int, error: Exception) -> Exception:
        if isinstance(error, RunFolderError):
            return error
        try:
            self.folder.confirm()
        except RunFolderError as moved:  # this is why the save failed
            return moved
        return save_failed(self.folder.checkpoints, step, error)


class _Pending:
    """A checkpoint that a thread of this rank is writing."""

    def __init__(
        self, step: int, also: Sequence[int], directory: Path, write: Callable[[], Mapping[str, Digest]]
    ) -> None:
        self.step, self.also = step, also
        self._written: Mapping[str, Digest] = {}
        self._error: Exception | None = None
        # A daemon thread: a run that quits at once must not wait for a checkpoint that it will not commit.
        self._thread = threading.Thread(target=self._run, args=(directory, write), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, directory: Path, write: Callable[[], Mapping[str, Digest]]) -> None:
        try:
            written = write()
            read_back(directory, written)
            self._written = written
        except Exception as error:
            self._error = error

    def result(self) -> Mapping[str, Digest]:
        """Waits for the thread and returns the digests of the written files. Raises: the error of the thread."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._written
