"""Groups: dense ids from labels on the host, and sums and means of rows within groups on any device."""

import operator
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from gvpo_core._arrays import Array, concrete, is_jax_array, namespace, scatter_options, stop_gradient, take_rows


def dense_group_ids(labels: Iterable[Hashable]) -> tuple[np.ndarray, int]:
    """Numbers the groups 0..G-1 in order of first appearance.

    Args:
      labels: N labels, any hashable values (prompt ids, strings, tuples, 0-d arrays); rows of a group share
        a label and may be anywhere.
    Returns: (group_ids, num_groups): (N,) int64 NumPy array and G.
    Raises: TypeError: not an iterable, a masked array, or a label that cannot be hashed, is an array of several
      numbers or is NaN, which equals nothing. ValueError: no labels.
    """
    if isinstance(labels, np.ma.MaskedArray):
        raise TypeError("labels is a numpy masked array; expected a label for each response, without a mask")
    try:
        rows = iter(labels.tolist() if hasattr(labels, "tolist") else labels)
    except TypeError:
        raise TypeError(f"labels is a {type(labels).__name__}; expected one label a response, in a list") from None
    seen: dict[Hashable, int] = {}
    ids = []
    for i, raw_label in enumerate(rows):
        label = _label(raw_label, f"labels[{i}]")
        if label != label:
            raise TypeError(f"labels[{i}] is NaN; NaN equals nothing, so it names no group")
        try:
            ids.append(seen.setdefault(label, len(seen)))
        except TypeError as e:
            raise TypeError(f"labels[{i}] is a {type(label).__name__}; expected a hashable label") from e
    if not ids:
        raise ValueError("labels is empty; expected one label a response")
    return np.asarray(ids, dtype=np.int64), len(seen)


def _label(raw_label: Any, where: str) -> Any:
    """Replaces 0-d arrays in a label by their values: those of torch and MLX hash by identity, not by value."""
    if isinstance(raw_label, tuple):
        return tuple(_label(part, where) for part in raw_label)
    if isinstance(raw_label, np.ma.MaskedArray):
        raise TypeError(f"{where} is masked; expected a label")
    if not array_api_compat.is_array_api_obj(raw_label):
        return raw_label
    if tuple(raw_label.shape) != ():
        raise TypeError(f"{where} is an array of shape {tuple(raw_label.shape)}; expected a hashable label")
    if hasattr(raw_label, "item"):
        return raw_label.item()
    return float(raw_label) if namespace(raw_label).isdtype(raw_label.dtype, "real floating") else int(raw_label)


def check_group_ids(xp: Any, group_ids: Array, num_groups: int | None) -> int:
    """Checks the ids; returns G: `num_groups`, or one more than the largest id if it is None.

    Raises: TypeError, ValueError: num_groups is not an integer, < 1 or missing under compilation; an id outside 0..G-1.
    """
    if num_groups is not None and not isinstance(num_groups, int):
        try:
            num_groups = operator.index(num_groups)
        except TypeError:
            raise TypeError(f"num_groups is {num_groups!r}; expected a static int of at least 1") from None
    low, high = concrete(xp.min(group_ids)), concrete(xp.max(group_ids))
    if num_groups is None:
        if high is None:
            raise ValueError("num_groups is None under compilation; pass the number of groups as a static int")
        num_groups = int(high) + 1
    if num_groups < 1:
        raise ValueError(f"num_groups is {num_groups}; expected at least 1")
    if low is not None and high is not None and (low < 0 or high >= num_groups):
        raise ValueError(
            f"group_ids span {int(low)}..{int(high)}; expected 0..{num_groups - 1} for num_groups ="
            f" {num_groups} (dense_group_ids makes them from any labels)"
        )
    return num_groups


def group_sum(values: Array, group_ids: Array, num_groups: int) -> Array:
    """Sums rows by group in O(N), without an N x G array, so that a NaN stays in its group.

    The standard has no scatter-add. This uses the library's own, and a segmented scan if it has none.

    Args:
      values: (N,) float; differentiated.
      group_ids: (N,) integer in 0..num_groups-1.
    Returns: (G,) in the dtype of `values`.
    """
    xp = namespace(values)
    if hasattr(values, "new_zeros"):  # torch
        return values.new_zeros(num_groups).index_add(0, group_ids.long(), values)
    if hasattr(values, "at"):  # jax, mlx
        zeros = xp.zeros(num_groups, dtype=values.dtype)
        return zeros.at[group_ids].add(values, **scatter_options(values))
    if hasattr(xp, "bincount"):  # numpy, cupy; sums in float64
        ids = xp.astype(group_ids, xp.int64)
        return xp.astype(xp.bincount(ids, weights=values, minlength=num_groups), values.dtype)
    zero = xp.zeros(num_groups, dtype=values.dtype)
    return _scan(xp, lambda a, b: a + b, values, group_ids, zero)


def group_max(values: Array, group_ids: Array, num_groups: int) -> Array:
    """Returns (G,) the largest value in each group; the lowest finite number for an empty group.

    It must not be differentiated: pass `values` through stop_gradient first.
    """
    xp = namespace(values)
    lowest = float(xp.finfo(values.dtype).min)
    if hasattr(values, "new_full"):  # torch
        return values.new_full((num_groups,), lowest).scatter_reduce(0, group_ids.long(), values, "amax")
    start = xp.full((num_groups,), lowest, dtype=values.dtype)
    if hasattr(values, "at"):  # jax, mlx
        at = start.at[group_ids]
        return at.max(values, **scatter_options(values)) if hasattr(at, "max") else at.maximum(values)
    if hasattr(xp.maximum, "at"):  # numpy, cupy
        xp.maximum.at(start, group_ids, values)
        return start
    return _scan(xp, xp.maximum, values, group_ids, start)


class Groups(NamedTuple):
    """The rows that count, and their groups. Such a row is valid and scored, and its group has enough of them."""

    xp: Any
    group_ids: Array  # (N,) integer
    num_groups: int
    counted: Array  # (N,) bool
    size: Array  # (num_groups,) float, scored rows, also of groups that do not count
    kept: Array  # (num_groups,) bool, groups that count

    def sum(self, values: Array) -> Array:
        """(N,) -> (num_groups,) sums."""
        return group_sum(values, self.group_ids, self.num_groups)

    def max(self, values: Array) -> Array:
        """(N,) -> (num_groups,) largest values of counted rows; the lowest finite number if none counts."""
        lowest = self.xp.full_like(values, float(self.xp.finfo(values.dtype).min))
        return group_max(self.xp.where(self.counted, values, lowest), self.group_ids, self.num_groups)

    def center(self, values: Array) -> Array:
        """(N,) -> (N,) values minus the mean of their group's counted rows; 0 for rows not counted."""
        return center(values, self.counted, self.group_ids, self.num_groups)

    def per_row(self, group_values: Array) -> Array:
        """(num_groups,) -> (N,) value of each row's group."""
        return take_rows(group_values, self.group_ids)

    def divisor(self, less: int = 0) -> Array:
        """Returns (num_groups,) k - less for groups that count, 1 for the others."""
        return self.xp.where(self.kept, self.size - less, self.xp.ones_like(self.size))

    def total(self) -> Array:
        """Returns () float, the number of groups that count."""
        return self.xp.sum(self.xp.astype(self.kept, self.size.dtype))

    def total_divisor(self) -> Array:
        """Returns () float, the number of groups that count, at least 1."""
        total = self.total()
        return self.xp.where(total > 0, total, self.xp.ones_like(total))

    def mean(self, group_values: Array) -> Array:
        """(num_groups,), 0 for groups that do not count -> () mean over the groups that count, 0 if none does."""
        return self.xp.sum(group_values) / self.total_divisor()

    def at_the_top(self, values: Array) -> Array:
        """Returns (N,) bool, the counted rows that have the largest value of their group."""
        return self.counted & (values == self.per_row(self.max(stop_gradient(values))))

    def share(self, chosen: Array) -> Array:
        """Returns (N,) 1 / the number of chosen rows in the group for chosen rows, 0 for the others."""
        chosen = self.xp.astype(chosen, self.size.dtype)
        number = self.sum(chosen)
        return chosen / self.per_row(self.xp.where(number > 0, number, self.xp.ones_like(number)))


def counted_groups(
    xp: Any, rewards: Array, group_ids: Array, num_groups: int | None, valid: Array | None, *, smallest: int
) -> Groups:
    """Builds the groups from checked arguments, in the dtype of `rewards`; NaN = no score.

    A row that is not valid or not scored leaves its group, and k is the number that remains (Cor. 3.4). A group with
    fewer than `smallest` rows does not count.
    """
    group_ids = _indices(xp, group_ids)
    num_groups = check_group_ids(xp, group_ids, num_groups)
    counted = ~xp.isnan(rewards) if valid is None else valid & ~xp.isnan(rewards)
    size = group_sum(xp.astype(counted, rewards.dtype), group_ids, num_groups)
    kept = size >= smallest
    return Groups(xp, group_ids, num_groups, counted & take_rows(kept, group_ids), size, kept)


def _indices(xp: Any, group_ids: Array) -> Array:
    """Returns the ids in a dtype that the library can index with and that can hold any number of groups."""
    if hasattr(group_ids, "long"):  # torch
        return group_ids.long()
    if is_jax_array(group_ids):  # JAX has int64 only with x64
        return group_ids if group_ids.dtype.itemsize >= 4 else xp.astype(group_ids, xp.int32)
    return xp.astype(group_ids, xp.int64)


def group_mean_of_rows(values: Array, counted: Array, group_ids: Array, num_groups: int) -> Array:
    """Returns (N,) the mean over the counted rows of each row's group; 0 for a group without any."""
    xp = namespace(values)
    total = group_sum(values, group_ids, num_groups)
    size = group_sum(xp.astype(counted, values.dtype), group_ids, num_groups)
    return take_rows(total / xp.where(size > 0, size, xp.ones_like(size)), group_ids)


def center(values: Array, counted: Array, group_ids: Array, num_groups: int) -> Array:
    """D(v)_i = v_i - mean of v over the counted rows of i's group; 0 for rows that are not counted.

    Centres twice: the second pass removes the rounding error of the first mean.
    """
    xp = namespace(values)
    zeros = xp.zeros_like(values)
    values = xp.where(counted, values, zeros)
    for _ in range(2):
        mean = group_mean_of_rows(values, counted, group_ids, num_groups)
        values = xp.where(counted, values - mean, zeros)
    return values


def _scan(xp: Any, combine: Any, values: Array, group_ids: Array, empty: Array) -> Array:
    """Combines rows by group with the standard's functions only: a sort, then a segmented scan of log2(N) steps."""
    order = xp.argsort(group_ids, stable=True)
    ids, scan = xp.take(group_ids, order), xp.take(values, order)
    row = xp.arange(ids.shape[0], dtype=xp.int64)
    step = 1
    while step < ids.shape[0]:
        back = xp.where(row >= step, row - step, xp.zeros_like(row))
        same = (row >= step) & (xp.take(ids, back) == ids)
        scan = xp.where(same, combine(scan, xp.take(scan, back)), scan)
        step *= 2
    all_ids = xp.arange(empty.shape[0], dtype=ids.dtype)
    last = xp.searchsorted(ids, all_ids, side="right") - 1
    last = xp.where(last >= 0, last, xp.zeros_like(last))
    return xp.where(xp.take(ids, last) == all_ids, xp.take(scan, last), empty)
