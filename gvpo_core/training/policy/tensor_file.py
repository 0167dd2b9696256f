"""Safetensors files written tensor by tensor, and hashed while they are written."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_PIECE = 2**24  # bytes hashed and written at once


class Digest(NamedTuple):
    """What a file holds, if it holds what was written."""

    bytes: int
    sha256: str


class Tensor(NamedTuple):
    """A tensor to write."""

    dtype: str  # as safetensors names it: F32, BF16, ...
    shape: tuple[int, ...]
    nbytes: int
    content: Callable[[], Any]  # its bytes in row-major order, little endian; called when they are written


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, lasting: bool = True) -> Digest:
    """Writes and syncs one safetensors file; one tensor's bytes are held at a time.

    Args:
      lasting: False: it is read at once and removed, so it is neither hashed nor synced, and the digest is empty.
    Raises: OSError: as writing does. ValueError: a tensor whose content has another size than its `nbytes`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        offsets = [offset, offset + tensor.nbytes]
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:

        def put(content: Any) -> int:
            nonlocal size
            view = memoryview(content).cast("B")
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                if lasting:
                    digest.update(piece)
                file.write(piece)
            size += len(view)
            return len(view)

        put(len(header).to_bytes(8, "little") + header)
        for name, tensor in tensors.items():
            if tensor.nbytes and (given := put(tensor.content())) != tensor.nbytes:
                raise ValueError(f"{name} gave {given} bytes to write; expected {tensor.nbytes}")
        file.flush()
        if lasting:
            os.fsync(file.fileno())
    return Digest(size, digest.hexdigest() if lasting else "")
