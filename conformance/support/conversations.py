"""Conversations of several turns, to compare turns that start from kept keys and values with turns computed anew."""

from collections.abc import Callable, Sequence
from typing import Any

from gvpo_core.training.policy import Tokens
from gvpo_core.training.sampling import row_seed


def play(
    generate: Callable[[list[Tokens], list[list[int]]], list[list[Any]]],
    openings: Sequence[Tokens],
    k: int,
    turns: int,
    heard: Callable[[int], Tokens],
) -> tuple[list[list[list[Any]]], int]:
    """The responses of all turns, and how many conversations went on after the last; one that is cut ends.

    Args:
      generate: (prompts, seeds) -> the responses to each prompt.
      k: conversations from each opening.
      heard: turn -> tokens that follow a response; called once for each.
    """
    drawn: list[list[list[Any]]] = []
    conversations = {(i, j): prompt for i, prompt in enumerate(openings) for j in range(k)}
    for turn in range(turns):
        prompts = sorted({*conversations.values()})
        rows = [[place for place, tokens in conversations.items() if tokens == prompt] for prompt in prompts]
        drawn.append(generate(prompts, [[row_seed(1, *place, turn) for place in places] for places in rows]))
        for places, responses in zip(rows, drawn[-1], strict=True):
            for place, response in zip(places, responses, strict=True):
                if response.finished:
                    conversations[place] = (*conversations[place], *response.tokens, *heard(turn))
                else:
                    del conversations[place]
    return drawn, len(conversations)
