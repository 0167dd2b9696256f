"""Reads the text of compiled JAX programs."""

import re


def arrays_with(dimension: int, text: str) -> list[tuple[int, ...]]:
    """Shapes in HLO text that have this dimension."""
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\[(\d+(?:,\d+)*)\]", text)}
    return sorted(shape for shape in shapes if dimension in shape)
