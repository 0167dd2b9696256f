"""Pickles that leave a mark when something unpickles them, in each form in which a loader could come by one."""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Names under which libraries keep pickles of a model or of a training's state.
USUAL = ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
         "state.pkl")  # fmt: skip


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def forms(mark: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes): the pickle itself, in NumPy's two files, and in PyTorch's; each makes the file `mark`."""
    bomb = _Bomb(mark)
    yield "pickle", pickle.dumps(bomb)
    array, arrays, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.array([bomb], object), allow_pickle=True)
    yield "npy", array.getvalue()
    names = ("logits", "update_count")  # of the table's checkpoint; another reader would take any
    np.savez(arrays, **{name: np.array([bomb], object) for name in names})
    yield "npz", arrays.getvalue()
    with zipfile.ZipFile(zipped, "w") as file:
        for name, content in {"data.pkl": pickle.dumps(bomb), "version": b"3\n", "byteorder": b"little"}.items():
            file.writestr(f"archive/{name}", content)
    yield "torch", zipped.getvalue()
