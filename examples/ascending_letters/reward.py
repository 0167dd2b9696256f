"""How well a response is eight letters in alphabetical order."""

from itertools import pairwise

WANTED = 8


def reward(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """The share of neighbours that ascend, of the seven that eight letters have, less a tenth a letter too many."""
    return [
        sum(a < b for a, b in pairwise(text[:WANTED])) / (WANTED - 1) - max(0, len(text) - WANTED) / 10
        for text in completions
    ]
