"""Rewards responses of eight letters in alphabetical order."""

from itertools import pairwise

WANTED = 8


def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Returns the share of the seven neighbouring pairs that ascend, minus 0.1 for each letter beyond eight."""
    return [
        sum(a < b for a, b in pairwise(text[:WANTED])) / (WANTED - 1) - max(0, len(text) - WANTED) / 10
        for text in completions
    ]
