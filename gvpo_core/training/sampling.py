"""How responses are drawn: settings, one seed per row, and the random numbers behind each token.

Random numbers are made on the host from (seed, position) only. So a response does not depend on the batch in which it
is drawn, the number of ranks or the array library, and a resumed run needs no generator state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TRAIN, EVALUATE, ORDER, REPLAY, REDRAW, CURRICULUM, OWN = range(
    7
)  # second keys of the seeds: each use has a separate stream


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation."""

    max_tokens: int  # tokens per response, end token included
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # 0: off
    stop: tuple[str, ...] = ()  # texts that end a response; the rollout drops what was drawn after them

    def __post_init__(self) -> None:
        for name, good, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {wanted}")

    @property
    def truncated_support(self) -> tuple[str, ...]:
        """The settings that give some of the model's responses probability 0, which Cor. 3.2 excludes."""
        cut = {
            "temperature": self.temperature == 0,
            "top_p": self.top_p < 1,
            "top_k": self.top_k > 0,
            "min_p": self.min_p > 0,
        }
        return tuple(f"{name} = {getattr(self, name)}" for name, is_cut in cut.items() if is_cut)


def row_seed(*keys: int) -> int:
    """A 64-bit seed from a path of non-negative integers, such as (run seed, step, prompt, response)."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


def uniforms(seeds: Sequence[int], start: int, stop: int) -> np.ndarray:
    """Returns numbers `start`..`stop`-1 of each row's stream.

    Args:
      seeds: R row seeds.
    Returns: (R, stop - start) float64 in [0, 1).
    """
    rows = []
    for seed in seeds:
        bits = np.random.Philox(key=seed)
        bits.advance(start // 4)  # one Philox block gives four 64-bit numbers
        rows.append(np.random.Generator(bits).random(stop - start // 4 * 4)[start % 4 :])
    return np.asarray(rows, dtype=np.float64).reshape(len(seeds), stop - start)
