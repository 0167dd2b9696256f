"""Stores the numbers of many records as one array for each key, in a tenth of the memory of the records."""

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np


class Columns:
    """Numbers by key and step. Putting a step again replaces its numbers."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # step -> place in every array
        self._values: dict[str, array[float]] = {}
        self._present: dict[str, bytearray] = {}  # 1 where the step has the key

    def put(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Adds the numbers of a step; None becomes NaN."""
        place = self._places.get(step)
        if place is None:
            place = self._places[step] = len(self._places)
        else:
            for flags in self._present.values():
                if place < len(flags):
                    flags[place] = 0
        for key, value in numbers.items():
            values, present = self._values.get(key), self._present.get(key)
            if values is None or present is None:
                values = self._values[key] = array("d")
                present = self._present[key] = bytearray()
            if place >= len(values):
                missing = place + 1 - len(values)
                values.extend([np.nan] * missing)
                present.extend(bytes(missing))
            values[place], present[place] = np.nan if value is None else value, 1

    def keys(self) -> list[str]:
        """The keys in order of first appearance."""
        return list(self._values)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps (n,), values (n,)) of the records that have the key, float64, sorted by step."""
        if key not in self._values:
            return np.zeros(0), np.zeros(0)
        present = np.frombuffer(self._present[key], np.uint8) > 0
        steps = np.fromiter(self._places, np.float64, len(self._places))[: len(present)][present]
        order = np.argsort(steps, kind="stable")
        return steps[order], np.array(self._values[key])[present][order]
