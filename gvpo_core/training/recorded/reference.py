"""Reference scores of recorded groups, computed once and kept on disk by what they are the scores of.

A group is scored alone, so its scores depend on the model and on the group, never on the step, the ranks or what else
was in the cache: a run whose cache is damaged, lost or full takes the same steps.
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
    """The file of reference scores: in data.reference_cache, else in `folder`, where one is given."""
    where = config.data.reference_cache or folder
    return Path(where).expanduser().absolute() / _FILE if where else None


class ReferenceScores:
    """log pi_ref of recorded responses. Every rank calls; the main rank has the file."""

    def __init__(self, config: Config, policy: Policy, path: Path | None) -> None:
        """
        Args:
          path: the file; it is made where it is missing. None: scores are kept in memory alone.
        """
        self.hits = self.misses = 0  # responses found, responses scored
        self._policy = policy
        model = policy.settings.model
        weights = model_fingerprint(model).get("weights") if model is not None else None
        # Without a fingerprint a later process may have another model.
        self._path = path if weights and policy.rank == 0 else None
        facts = policy.describe().as_dict()
        described = {name: str(facts[name]) for name in _FACTS if name in facts}
        batch = config.optimizer
        limits = [batch.micro_batch_tokens, batch.micro_batch_responses]
        # The same weights give other scores packed in 4 bits, compiled, and as the base of adapters.
        used = {} if model is None else {n: getattr(model, n) for n in ("quantization", "compile")}
        used |= {} if model is None else {"adapted": bool(model.lora_rank)}
        self._model = json.dumps([weights, described, used, *limits], sort_keys=True)
        self._limit = config.data.reference_cache_size * _MEBIBYTE  # bytes; 0: no limit
        self._known: OrderedDict[str, list[float]] = OrderedDict()
        self._size = 0
        self._opened = False

    def of(self, groups: Sequence[Scored]) -> list[np.ndarray]:
        """The scores of each group's responses, (k,) float64, nats."""
        if not self._opened:
            self._opened = True
            self._read()
        keys = [self._key(group) for group in groups]
        cached = self._found(keys, groups)
        missing = [g for g, scores in enumerate(cached) if scores is None]
        fresh = self._scored([groups[g] for g in missing])
        new: dict[str, list[float]] = {}
        for g, scores in zip(missing, fresh, strict=True):
            cached[g] = scores
            new[keys[g]] = scores.tolist()
        self.misses += sum(len(scores) for scores in fresh)
        self.hits += sum(len(group[1]) for group in groups) - sum(len(scores) for scores in fresh)
        self._keep(new)
        return [np.asarray(scores, np.float64) for scores in cached]

    def _key(self, group: Scored) -> str:
        prompt, responses = group
        masks = masks_of(responses)
        key: list[object] = [self._model, [prompt, [r.tokens for r in responses]], *([] if masks is None else [masks])]
        if (later := later_of(responses)) is not None:
            key.append({"later": [[*map(astuple, segments)] for segments in later]})
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()

    def _found(self, keys: Sequence[str], groups: Sequence[Scored]) -> list[np.ndarray | None]:
        """What the main rank knows, on every rank; None: the scores of this group are missing."""
        cached = [self._known.get(key) for key in keys] if self._policy.rank == 0 else []
        line = np.frombuffer(json.dumps(cached).encode() if cached else b"", np.uint8)
        if self._policy.world_size > 1:
            line = self._policy.gather(line)
        known = json.loads(line.tobytes() or b"[]")
        return [
            np.asarray(scores) if scores is not None and len(scores) == len(group[1]) else None
            for scores, group in zip(known, groups, strict=True)
        ]

    def _scored(self, groups: Sequence[Scored]) -> list[np.ndarray]:
        """Scores the groups, dealt out over the ranks; a rank that has none left takes part without rows."""
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

    def _keep(self, new: Mapping[str, list[float]]) -> None:
        if self._policy.rank != 0 or not new:
            return
        self._known.update(new)
        content = b"".join(_line(key, scores) for key, scores in new.items())
        self._size += len(content)
        full = bool(self._limit) and self._size > self._limit
        if full:
            self._forget()
        if self._path is not None:
            with self._failing_softly():
                if full:
                    write_synced(self._path, b"".join(_line(k, v) for k, v in self._known.items()))
                else:
                    append_synced(self._path, content)

    def _forget(self) -> None:
        """Drops the oldest scores down to half of the limit."""
        while self._known and self._size > self._limit // 2:
            key, scores = self._known.popitem(last=False)
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
            if content and not content.endswith(b"\n"):  # cut by a kill: the next line must not join it
                with self._path.open("ab") as f:
                    f.write(b"\n")
                    os.fsync(f.fileno())
            for line in content.splitlines():
                entry = _entry(line)
                damaged += entry is None and bool(line.strip())
                if entry is not None:
                    self._known[entry[0]] = entry[1]
            self._size = len(content)
        if damaged:
            _log.warning("%s: %d damaged lines; their scores are computed again", self._path, damaged)

    @contextlib.contextmanager
    def _failing_softly(self) -> Iterator[None]:
        """A cache that cannot be read or written costs time, not the run."""
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
    """Key and scores of a line; None: it is damaged."""
    try:
        entry = json.loads(line)
        key, scores = entry["key"], entry["scores"]
        intact = entry["check"] == _check(key, scores)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (key, scores) if intact else None
