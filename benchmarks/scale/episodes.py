"""Episodes whose chat template drops thoughts, and how many tokens an update on them needs."""

import numpy as np

from gvpo_core.training.policy import Batch, Segment
from gvpo_core.training.policy.segments import sharing_beginnings

K, PROMPT, THOUGHT, ANSWER, HEARD = 8, 400, 100, 20, 40
ON = f"{K} episodes of %d turns; tokens: prompt {PROMPT}, thought %s, answer {ANSWER}, environment {HEARD}"


def segments(turns: int, groups: int = 1, longest: int = 1) -> tuple[Batch, Batch]:
    """Returns one row per segment, twice: as separate rows, and as rows that share their common beginnings.

    Args:
      longest: length of the longest thoughts, as a multiple of THOUGHT.
    """
    draw = np.random.default_rng(turns)
    ids = lambda count: tuple(draw.integers(1, 80, count).tolist())
    prompts, responses, later = [], [], []
    for _ in range(groups):
        prompt = ids(PROMPT)
        for _ in range(K):
            seen, of_episode = prompt, []
            for _ in range(turns):
                thought = ids(THOUGHT * int(draw.integers(1, longest + 1)))
                of_episode.append(Segment(seen, thought + ids(ANSWER)))  # the template drops the thought
                seen = (*seen, *ids(ANSWER + HEARD))  # the rendered answer and the environment's reply
            prompts.append(prompt)
            responses.append(of_episode[0].response)
            later.append(tuple(of_episode[1:]))
    rows, _ = Batch(prompts, responses, [i // K for i in range(groups * K)], later=later).by_segment()
    return rows, sharing_beginnings(rows, groups * K)


def needed(rows: Batch) -> int:
    """Returns how many distinct beginnings the rows have: the tokens that an update must compute, once per group."""
    inputs = {(g, p + r[:-1]) for g, p, r in zip(rows.groups, rows.prompts, rows.responses, strict=True)}
    return len({hash((g, text[:n])) for g, text in inputs for n in range(1, len(text) + 1)})
