"""The demo's reward: reasoning-gym's verifier for `basic_arithmetic`, applied to the last number of a response."""

import importlib.util
import re
import sys
import types
from collections.abc import Sequence
from functools import cache
from typing import Any


def load_reasoning_gym() -> Any:
    """Returns the module `reasoning_gym`. Replaces pycosat, which needs a C compiler; arithmetic never calls it."""
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    import reasoning_gym

    return reasoning_gym


@cache
def _verifier() -> Any:
    return load_reasoning_gym().get_score_answer_fn("basic_arithmetic")


def reward(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Returns 1 for a completion whose last number is the answer, else 0.

    The verifier gives a partial score to a number that contains the answer (12 for 2). This counts as 0 here.

    Args:
      prompts: N prompts; not used.
      completions: N chat completions, each a list of one assistant message.
      answer: N right answers, a column of the data.
    """
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", completion[0]["content"])
        scores.append(float(bool(numbers) and _verifier()(numbers[-1], {"answer": right}) == 1))
    return scores
