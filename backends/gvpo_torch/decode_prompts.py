"""Prompts that decoding holds once for all their rows: which slot holds which, and what the rows attend to in them.

A token's attention has two parts, to its row's prompt and to what the row itself drew. Each is a softmax over its own
keys; the logarithms of the two normalisers say how much each counts. All rows of a prompt attend together, so its keys
are read once. Shapes are fixed, and what changes between tokens is changed in place: a CUDA graph may hold it all.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Prefilled(NamedTuple):
    """R rows of U prompts, after one forward pass over the prompts."""

    logits: Tensor  # (U, V) float32, after the prompts
    cache: Any  # transformers' cache of the prompts, W slots each
    mask: Tensor | None  # (U, W) bool, False on padding; None: no padding
    owners: Tensor  # (R,) int64, the prompt of each row


class Slots:
    """Which slot holds which prompt, on the host: from the prompt's first row on until its last one has ended."""

    def __init__(self, prompts: Sequence[int], most: int) -> None:
        """`prompts`: of each row, those of one prompt one after another; `most`: slots, at least one."""
        self.prompts, self.most = prompts, most
        self.count = 0  # slots in use so far
        self.of: dict[int, int] = {}  # prompt -> slot
        self._free: list[int] = []
        self._left = Counter(prompts)  # rows that have not ended

    def admit(self, waiting: deque[int], most: int) -> tuple[list[int], list[int]]:
        """Takes up to `most` waiting rows, as far as there are slots; also those of them whose prompts are new."""
        rows: list[int] = []
        fresh: list[int] = []
        while waiting and len(rows) < most:
            prompt = self.prompts[waiting[0]]
            if prompt not in self.of:
                if not self._free:
                    if self.count == self.most:
                        break
                    self._free.append(self.count)
                    self.count += 1
                self.of[prompt] = self._free.pop()
                fresh.append(waiting[0])
            rows.append(waiting.popleft())
        return rows, fresh

    def __getitem__(self, row: int) -> int:
        """The slot of a row that has begun and not ended."""
        return self.of[self.prompts[row]]

    def end(self, row: int) -> None:
        """A row has ended; the last one of its prompt leaves the slot to another prompt."""
        prompt = self.prompts[row]
        self._left[prompt] -= 1
        if not self._left[prompt]:
            self._free.append(self.of.pop(prompt))

    def compact(self) -> list[int]:
        """Numbers the slots in use anew, from 0 on; gives their old numbers."""
        old = [*self.of.values()]
        self.of = {prompt: slot for slot, prompt in enumerate(self.of)}
        self.count, self._free = len(old), []
        return old


class Prompts:
    """Keys and values (U, heads, W, D) of U prompts in each layer, padded on the left, which L lines attend to."""

    def __init__(self, first: Prefilled, lines: int, together: int, dtype: torch.dtype) -> None:
        """Room for as many prompts as `first` has rows; `together`: most lines of one prompt."""
        slots, device = len(first.owners), first.owners.device
        width = aligned(first.cache.layers[0].keys.shape[2])
        empty = lambda states: torch.zeros(
            (slots, states.shape[1], width, states.shape[3]), dtype=dtype, device=states.device
        )
        self.keys = [empty(layer.keys) for layer in first.cache.layers]
        self.values = [empty(layer.values) for layer in first.cache.layers]
        # A slot without a prompt is not masked: a softmax over nothing would be NaN.
        self.bias = torch.zeros((slots, 1, 1, width), dtype=dtype, device=device)
        self.lines = torch.zeros((slots, together), dtype=torch.int64, device=device)  # of each prompt; else any line
        self.places = torch.zeros(lines, dtype=torch.int64, device=device)  # of each line in `lines`, flattened

    @property
    def slots(self) -> int:
        """Prompts that there is room for."""
        return int(self.bias.shape[0])

    def hold(self, slots: Tensor, prompts: Prefilled) -> None:
        """Puts prompts into slots (n,) int64, no wider than the first ones."""
        width = prompts.cache.layers[0].keys.shape[2]
        for buffers, name in ((self.keys, "keys"), (self.values, "values")):
            for buffer, layer in zip(buffers, prompts.cache.layers, strict=True):
                buffer[slots, :, -width:] = getattr(layer, name).index_select(0, prompts.owners).to(buffer.dtype)
        seen = torch.zeros((len(slots), width), dtype=self.bias.dtype, device=slots.device)
        if prompts.mask is not None:
            seen.masked_fill_(~prompts.mask.index_select(0, prompts.owners), -torch.inf)
        self.bias[slots] = -torch.inf
        self.bias[slots, 0, 0, -width:] = seen

    def assign(self, slots: np.ndarray) -> None:
        """The slot of each line, (L,) int64; -1: a line without a row."""
        used = np.flatnonzero(slots >= 0)
        used = used[np.argsort(slots[used], kind="stable")]
        of = slots[used]
        number = np.arange(len(used)) - np.searchsorted(of, of)  # among the lines of its prompt
        lines, places = np.zeros(self.lines.shape, dtype=np.int64), np.zeros(len(slots), dtype=np.int64)
        lines[of, number] = used
        places[used] = of * lines.shape[1] + number
        self.lines.copy_(torch.from_numpy(lines))
        self.places.copy_(torch.from_numpy(places))

    def grow(self, slots: int) -> None:
        """Room for as many prompts; `assign` comes next."""
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.new_zeros((slots, *held.shape[1:]))
                buffers[i][: len(held)] = held
        for name in ("bias", "lines"):
            held = getattr(self, name)
            setattr(self, name, torch.cat([held, held.new_zeros((slots - len(held), *held.shape[1:]))]))

    def keep(self, slots: Tensor, lines: int, together: int) -> None:
        """Keeps the prompts of the given slots, (n,) int64, for fewer lines; `assign` comes next."""
        for buffers in (self.keys, self.values):
            for i, held in enumerate(buffers):
                buffers[i] = held.index_select(0, slots)
        self.bias = self.bias.index_select(0, slots)
        self.lines = self.lines.new_zeros((len(slots), together))
        self.places = self.places.new_zeros(lines)

    def attended(self, layer: int, query: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
        """`attended` of one query a line, (L, heads, shared, D), over the keys and values of its prompt."""
        asked = query[self.lines]  # on CUDA `index_select` takes three times as long for up to 16 lines
        asked = asked.transpose(1, 2).flatten(2, 3)  # all lines of a prompt in the axis of queries
        found = attended(asked, self.keys[layer], self.values[layer], self.bias, scaling)
        out, normaliser = (x.unflatten(2, (self.lines.shape[1], -1)).transpose(1, 2).flatten(0, 1) for x in found)
        return out[self.places], normaliser[self.places]


def attended(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of its softmax's normaliser; on CUDA by a kernel that gives both.

    Args:
      query: (B, heads, M, D); keys, values: (B, heads, N, D) of the same dtype.
      bias: (B, 1, 1, N) of that dtype, -inf on what is not seen; each row sees something.
    Returns: (B, heads, M, D) in that dtype or in float32, and (B, heads, M) float32.
    """
    query = query.to(keys.dtype)
    mask = bias.expand(*query.shape[:3], keys.shape[2])
    kernel = _on_cuda if _has_kernel(query, values) else _products
    return kernel(query, keys, values, mask, scaling)


def _has_kernel(query: Tensor, values: Tensor) -> bool:
    return query.device.type == "cuda" and query.shape[3] % 8 == values.shape[3] % 8 == 0  # sizes of heads


def _on_cuda(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    out, normaliser, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, mask, True, scale=scaling
    )
    return out, normaliser.narrow(2, 0, query.shape[2])  # padded to a multiple of 32


def _products(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        scores = query.float() @ keys.float().transpose(2, 3) * scale + mask
        normaliser = scores.logsumexp(3)
        return (scores - normaliser.unsqueeze(3)).exp() @ values.float(), normaliser


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys, from that over each, as `attended` gives it; float32."""
    weight = (one[1] - other[1]).sigmoid().unsqueeze(-1)
    return torch.lerp(other[0].float(), one[0].float(), weight)


def aligned(slots: int) -> int:
    """At least as many slots of keys: kernels with a mask want rows of 16 bytes."""
    return slots + -slots % 8
