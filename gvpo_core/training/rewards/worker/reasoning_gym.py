"""Uses reasoning-gym's datasets as rows, and its verifiers as a reward.

A row names its dataset and the index of its entry. The verifier generates the entry again from them, because an entry's
metadata has types that files do not preserve: tuples, sets, numeric keys.
"""

import functools
import importlib
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from .builtin import text_of

PREFIX = "reasoning_gym:"


def is_spec(source: object) -> bool:
    """Whether a source of data is "reasoning_gym:NAME" or "reasoning_gym:NAME?size=500&seed=1"."""
    return isinstance(source, str) and source.startswith(PREFIX)


@functools.lru_cache(maxsize=16)
def open_dataset(spec: str) -> Any:
    """The dataset of "reasoning_gym:NAME?SETTING=VALUE&...". Defaults: size 1000, seed 0.

    Raises: LookupError: reasoning-gym cannot be imported, has no such dataset, or takes no such settings.
    """
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    settings = {"size": 1000, "seed": 0} | {key: _value(value) for key, value in parse_qsl(query)}
    try:
        library = _library()
    except ImportError as e:
        raise LookupError(f"{spec} needs reasoning-gym ({e}): pip install reasoning-gym") from e
    try:
        return library.create_dataset(name, **settings)
    except Exception as e:  # datasets raise various errors for wrong settings
        raise LookupError(f"{spec}: reasoning-gym cannot make it: {type(e).__name__}: {e}") from e


def rows_of(spec: str) -> list[dict[str, Any]]:
    """The dataset's entries: prompt, answer, and dataset and index for the verifier. Raises: LookupError."""
    entries = open_dataset(spec)
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "dataset": spec, "index": index}
        for index, entry in enumerate(entries)
    ]


def reasoning_gym(completions: Sequence[Any], dataset: Sequence[str], index: Sequence[int]) -> list[float]:
    """The score of reasoning-gym's verifier, 0 to 1, for the last <answer> element, or the whole text without one."""
    scores = []
    for completion, spec, i in zip(completions, dataset, index, strict=True):
        text = text_of(completion)
        tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        entries = open_dataset(spec)
        scores.append(float(entries.score_answer((tagged[-1] if tagged else text).strip(), entries[int(i)])))
    return scores


def _library() -> Any:
    return importlib.import_module("reasoning_gym")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
