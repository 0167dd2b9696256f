"""Writes safetensors files tensor by tensor, and hashes them while writing."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_PIECE = 2**24  # bytes hashed and written at once


class Digest(NamedTuple):
    """Size and hash of a file as it was written."""

    bytes: int
    sha256: str


class Tensor(NamedTuple):
    """A tensor to write."""

    dtype: str  # as safetensors names it: F32, BF16, ...
    shape: tuple[int, ...]
    nbytes: int
    content: Callable[[], Any]  # returns its bytes in row-major order, little endian; called when they are written


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, lasting: bool = True) -> Digest:
    """Writes and syncs one safetensors file. Holds the bytes of one tensor at a time.

    Args:
      lasting: False: the file is read at once and then removed. It is not hashed or synced, and the digest is empty.
    Raises: OSError: writing failed. ValueError: the content of a tensor differs in size from its `nbytes`.
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
            if tensor.nbytes and (written := put(tensor.content())) != tensor.nbytes:
                raise ValueError(f"{name} gave {written} bytes to write; expected {tensor.nbytes}")
        file.flush()
        if lasting:
            os.fsync(file.fileno())
    return Digest(size, digest.hexdigest() if lasting else "")
