"""A cache of model-based scores by the content that was scored, so that no text is scored twice."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any


class ScoreCache:
    """Scores by key, in memory and, if a file is given, on disk. Several processes may share the file."""

    def __init__(self, path: str) -> None:
        """
        Args:
          path: a JSON-lines file, created if it is missing. Empty: memory only.
        """
        self.path = os.path.expanduser(path)
        self.scores: dict[str, float] = {}
        if not path:
            return
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise LookupError(f"options.cache = {path!r} is not a file")
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "a+b") as f:
                f.seek(0)
                for line in f:
                    self._take(line)
        except OSError as e:
            raise LookupError(f"options.cache = {path!r} cannot be used: {e.strerror or e}") from e

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            self.scores[str(entry["key"])] = float(entry["score"])
        except (ValueError, KeyError, TypeError):  # a line that a kill cut short
            return

    def put(self, scores: Mapping[str, float]) -> None:
        """Adds new scores."""
        self.scores |= scores
        if self.path and scores:
            lines = "".join(json.dumps({"key": key, "score": score}) + "\n" for key, score in scores.items())
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, ("\n" + lines).encode())  # one write; "\n" ends a line that a kill cut short
                os.fsync(file)
            finally:
                os.close(file)


@functools.lru_cache(maxsize=8)
def cache_of(path: str) -> ScoreCache:
    """The cache of a file; a process has one for each file. Raises: LookupError: the file cannot be used."""
    return ScoreCache(path)


def key_of(*content: Any) -> str:
    """The key of scored content. Values that JSON does not have count by their text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
