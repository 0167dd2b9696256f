"""Prompts whose keys and values decoding holds once for all their rows: the slots of prompts, and attention to them.

A token's attention has two parts: to its row's prompt, and to the tokens that the row drew. Each is a softmax over its
own keys. The logarithms of the two normalisers give the weights of the parts. All rows of a prompt attend together, so
its keys are read once. Shapes are fixed and updates are in place, so a CUDA graph can hold all of it.
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
    """Assigns slots to prompts, on the host. A prompt holds its slot from its first row until its last row ends."""

    def __init__(self, prompts: Sequence[int], most: int) -> None:
        """`prompts`: prompt of each row, rows of a prompt one after another; `most`: number of slots, at least one."""
        self.prompts, self.most = prompts, most
        self.count = 0  # slots in use so far
        self.of: dict[int, int] = {}  # prompt -> slot
        self._free: list[int] = []
        self._left = Counter(prompts)  # rows that have not ended

    def admit(self, waiting: deque[int], most: int) -> tuple[list[int], list[int]]:
        """Takes up to `most` waiting rows, if there are slots. Returns them, and the first row of each new prompt."""
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
        """Marks a row as ended. The last row of a prompt frees the slot for another prompt."""
        prompt = self.prompts[row]
        self._left[prompt] -= 1
        if not self._left[prompt]:
            self._free.append(self.of.pop(prompt))

    def compact(self) -> list[int]:
        """Renumbers the slots in use from 0. Returns their old numbers."""
        old = [*self.of.values()]
        self.of = {prompt: slot for slot, prompt in enumerate(self.of)}
        self.count, self._free = len(old), []
        return old


class Prompts:
    """Keys and values (U, heads, W, D) of U prompts in each layer, padded on the left. L lines attend to them."""

    def __init__(self, first: Prefilled, lines: int, together: int, dtype: torch.dtype) -> None:
        """Makes room for as many prompts as `first` has rows; `together`: largest number of lines of one prompt."""
        slots, device = len(first.owners), first.owners.device
        width = aligned(first.cache.layers[0].keys.shape[2])
        empty = lambda states: torch.zeros(
            (slots, states.shape[1], width, states.shape[3]), dtype=dtype, device=states.device
        )
        self.keys = [empty(layer.keys) for layer in first.cache.layers]
        self.values = [empty(layer.values) for layer in first.cache.layers]
        # A slot without a prompt is not masked: a softmax over nothing would be NaN.
        self.bias = torch.zeros((slots, 1, 1, width), dtype=dtype, device=device)
        # The lines of each prompt; unused entries are any line.
        self.lines = torch.zeros((slots, together), dtype=torch.int64, device=device)
        self.places = torch.zeros(lines, dtype=torch.int64, device=device)  # index of each line in flattened `lines`

    @property
    def slots(self) -> int:
        """Number of prompts for which there is room."""
        return int(self.bias.shape[0])

    def hold(self, slots: Tensor, prompts: Prefilled) -> None:
        """Puts prompts into slots, (n,) int64. They must not be wider than the first prompts."""
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
        """Sets the slot of each line, (L,) int64; -1: a line without a row."""
        used = np.flatnonzero(slots >= 0)
        used = used[np.argsort(slots[used], kind="stable")]
        used_slots = slots[used]
        number = np.arange(len(used)) - np.searchsorted(used_slots, used_slots)  # index among the prompt's lines
        lines, places = np.zeros(self.lines.shape, dtype=np.int64), np.zeros(len(slots), dtype=np.int64)
        lines[used_slots, number] = used
        places[used] = used_slots * lines.shape[1] + number
        self.lines.copy_(torch.from_numpy(lines))
        self.places.copy_(torch.from_numpy(places))

    def grow(self, slots: int) -> None:
        """Makes room for `slots` prompts. Call `assign` next."""
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer.new_zeros((slots, *buffer.shape[1:]))
                buffers[i][: len(buffer)] = buffer
        for name in ("bias", "lines"):
            buffer = getattr(self, name)
            setattr(self, name, torch.cat([buffer, buffer.new_zeros((slots - len(buffer), *buffer.shape[1:]))]))

    def keep(self, slots: Tensor, lines: int, together: int) -> None:
        """Keeps only the prompts of the given slots, (n,) int64, for fewer lines. Call `assign` next."""
        for buffers in (self.keys, self.values):
            for i, buffer in enumerate(buffers):
                buffers[i] = buffer.index_select(0, slots)
        self.bias = self.bias.index_select(0, slots)
        self.lines = self.lines.new_zeros((len(slots), together))
        self.places = self.places.new_zeros(lines)

    def attended(self, layer: int, query: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
        """Calls `attended` with one query per line, (L, heads, shared, D), and the keys and values of its prompt."""
        queries = query[self.lines]  # on CUDA `index_select` takes three times as long for up to 16 lines
        queries = queries.transpose(1, 2).flatten(2, 3)  # all lines of a prompt on the axis of queries
        results = attended(queries, self.keys[layer], self.values[layer], self.bias, scaling)
        out, normaliser = (x.unflatten(2, (self.lines.shape[1], -1)).transpose(1, 2).flatten(0, 1) for x in results)
        return out[self.places], normaliser[self.places]


def attended(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Returns attention and the logarithm of its softmax normaliser; on CUDA one kernel computes both.

    Args:
      query: (B, heads, M, D); keys, values: (B, heads, N, D) of the same dtype.
      bias: (B, 1, 1, N) of that dtype, -inf for keys that are not seen; each row sees at least one.
    Returns: (B, heads, M, D) in that dtype or in float32, and (B, heads, M) float32.
    """
    query = query.to(keys.dtype)
    mask = bias.expand(*query.shape[:3], keys.shape[2])
    kernel = _on_cuda if _has_kernel(query, values) else _products
    return kernel(query, keys, values, mask, scaling)


def _has_kernel(query: Tensor, values: Tensor) -> bool:
    return query.device.type == "cuda" and query.shape[3] % 8 == values.shape[3] % 8 == 0  # head sizes


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


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Returns attention over two sets of keys, float32, from the results of `attended` over each set."""
    weight = (first[1] - second[1]).sigmoid().unsqueeze(-1)
    return torch.lerp(second[0].float(), first[0].float(), weight)


def aligned(slots: int) -> int:
    """Rounds a number of key slots up to a multiple of 8: kernels with a mask need rows of 16 bytes."""
    return slots + -slots % 8
