"""Reference scores of recorded groups, computed once and cached on disk. The key covers the model and the group.

Each group is scored alone, so its scores depend only on the model and the group: never on the step, the ranks or other
cache entries. A run with a damaged, lost or full cache takes the same steps.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from gvpo_core.training.config import Config
from gvpo_core.training.files.disk import make_synced, refuse_special, write_synced
from gvpo_core.training.files.records import append_synced
from gvpo_core.training.fingerprint import model_fingerprint
from gvpo_core.training.policy import Batch, Policy, Response, Tokens, later_of, masks_of

_log = logging.getLogger("gvpo")
_FACTS = ("backend", "architecture", "device", "device_name", "dtype", "sharding", "mesh", "layout", "versions")
_MEBIBYTE = 2**20
_FILE = "reference_scores.jsonl"

Scored = tuple[Tokens, tuple[Response, ...]]  # a prompt and its responses


def reference_file(config: Config, folder: str | None = None) -> Path | None:
    """Path of the file of reference scores: in data.reference_cache, else in `folder`; None if there is neither."""
    where = config.data.reference_cache or folder
    return Path(where).expanduser().absolute() / _FILE if where else None


class ReferenceScores:
    """log pi_ref of recorded responses. Every rank calls its methods; only the main rank has the file."""

    def __init__(self, config: Config, policy: Policy, path: Path | None) -> None:
        """
        Args:
          path: the file; created if it is missing. None: scores are kept only in memory.
        """
        self.hits = self.misses = 0  # responses with cached scores, responses scored
        self._policy = policy
        model = policy.settings.model
        weights = model_fingerprint(model).get("weights") if model is not None else None
        # Without a fingerprint, a later process might have another model.
        self._path = path if weights and policy.rank == 0 else None
        facts = policy.describe().as_dict()
        described = {name: str(facts[name]) for name in _FACTS if name in facts}
        batch = config.optimizer
        limits = [batch.micro_batch_tokens, batch.micro_batch_responses]
        # The same weights give different scores if quantised to 4 bits, compiled, or used as the base of adapters.
        usage = {} if model is None else {n: getattr(model, n) for n in ("quantization", "compile")}
        usage |= {} if model is None else {"adapted": bool(model.lora_rank)}
        self._model = json.dumps([weights, described, usage, *limits], sort_keys=True)
        self._limit = config.data.reference_cache_size * _MEBIBYTE  # bytes; 0: no limit
        self._cache: OrderedDict[str, list[float]] = OrderedDict()
        self._size = 0
        self._opened = False

    def of(self, groups: Sequence[Scored]) -> list[np.ndarray]:
        """Returns the scores of each group's responses, (k,) float64, nats."""
        if not self._opened:
            self._opened = True
            self._read()
        keys = [self._key(group) for group in groups]
        cached = self._cached(keys, groups)
        missing = [g for g, scores in enumerate(cached) if scores is None]
        fresh = self._scored([groups[g] for g in missing])
        new: dict[str, list[float]] = {}
        for g, scores in zip(missing, fresh, strict=True):
            cached[g] = scores
            new[keys[g]] = scores.tolist()
        self.misses += sum(len(scores) for scores in fresh)
        self.hits += sum(len(group[1]) for group in groups) - sum(len(scores) for scores in fresh)
        self._store(new)
        return [np.asarray(scores, np.float64) for scores in cached]

    def _key(self, group: Scored) -> str:
        prompt, responses = group
        masks = masks_of(responses)
        key: list[object] = [self._model, [prompt, [r.tokens for r in responses]], *([] if masks is None else [masks])]
        if (later := later_of(responses)) is not None:
            key.append({"later": [[*map(astuple, segments)] for segments in later]})
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _cached(self, keys: Sequence[str], groups: Sequence[Scored]) -> list[np.ndarray | None]:
        """Returns the main rank's cached scores, on every rank; None for a group without cached scores."""
        cached = [self._cache.get(key) for key in keys] if self._policy.rank == 0 else []
        line = np.frombuffer(json.dumps(cached).encode() if cached else b"", np.uint8)
        if self._policy.world_size > 1:
            line = self._policy.gather(line)
        known = json.loads(line.tobytes() or b"[]")
        return [
            np.asarray(scores) if scores is not None and len(scores) == len(group[1]) else None
            for scores, group in zip(known, groups, strict=True)
        ]

    def _scored(self, groups: Sequence[Scored]) -> list[np.ndarray]:
        """Scores the groups, dealt to the ranks in turn. A rank without a group takes part without rows."""
        ranks, rank, result = self._policy.world_size, self._policy.rank, []
        for first in range(0, len(groups), ranks):
            turn = groups[first : first + ranks]
            prompt, responses = turn[rank] if rank < len(turn) else ((), ())
            count, tokens = len(responses), [r.tokens for r in responses]
            batch = Batch([prompt] * count, tokens, [0] * count, masks_of(responses), later=later_of(responses))
            scores = self._policy.logprobs(batch, reference=True)
            every = self._policy.gather(np.asarray(scores, np.float64)) if ranks > 1 else np.asarray(scores, np.float64)
            result += np.split(every, np.cumsum([len(group[1]) for group in turn])[:-1])
        return result

    def _store(self, new: Mapping[str, list[float]]) -> None:
        if self._policy.rank != 0 or not new:
            return
        self._cache.update(new)
        content = b"".join(_line(key, scores) for key, scores in new.items())
        self._size += len(content)
        full = bool(self._limit) and self._size > self._limit
        if full:
            self._evict()
        if self._path is not None:
            with self._failing_softly():
                if full:
                    write_synced(self._path, b"".join(_line(k, v) for k, v in self._cache.items()))
                else:
                    append_synced(self._path, content)

    def _evict(self) -> None:
        """Drops the oldest scores down to half of the limit."""
        while self._cache and self._size > self._limit // 2:
            key, scores = self._cache.popitem(last=False)
            self._size -= len(_line(key, scores))

    def _read(self) -> None:
        damaged = 0
        if self._path is None:
            return
        with self._failing_softly():
            make_synced(self._path.parent)
            refuse_special(self._path)
            if not self._path.exists():
                return
            content = self._path.read_bytes()
            if content and not content.endswith(b"\n"):  # half a line, after a kill: nothing must join it
                with self._path.open("ab") as f:
                    f.write(b"\n")
                    os.fsync(f.fileno())
            for line in content.splitlines():
                entry = _entry(line)
                damaged += entry is None and bool(line.strip())
                if entry is not None:
                    self._cache[entry[0]] = entry[1]
            self._size = len(content)
        if damaged:
            _log.warning("%s: %d damaged lines; their scores are computed again", self._path, damaged)

    @contextlib.contextmanager
    def _failing_softly(self) -> Iterator[None]:
        """Turns errors of the cache into a warning: without a cache, the run only takes longer."""
        try:
            yield
        except OSError as e:
            _log.warning(
                "%s cannot be used (%s): reference scores are kept in memory only", self._path, e.strerror or e
            )
            self._path = None


def _line(key: str, scores: Sequence[float]) -> bytes:
    return f'{{"key": "{key}", "scores": {json.dumps(scores)}, "check": "{_check(key, scores)}"}}\n'.encode()


def _check(key: str, scores: Sequence[float]) -> str:
    return hashlib.sha256(f"{key} {json.dumps(scores)}".encode()).hexdigest()[:16]


def _entry(line: bytes) -> tuple[str, list[float]] | None:
    """Returns the key and the scores of a line; None if it is damaged."""
    try:
        entry = json.loads(line)
        key, scores = entry["key"], entry["scores"]
        intact = entry["check"] == _check(key, scores)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, scores) if intact else None
