"""Reward functions of unusual forms, results and errors: scored as they mean, or refused in a line that names them."""

import os

import numpy as np
import pytest

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.rewards import RewardError, close_rewards, load_rewards, score

pytestmark = pytest.mark.core

MODULE = """
import fractions

class Judge:
    settings, fields, warm_up, answer_option = {"model": "x"}, ["a"], 3, "column"
    def __call__(self, completions, column):
        return [float(c == a) for c, a in zip(completions, column)]

judge = Judge()

def by_place(completions, other=None, column=None, /):
    assert other is None
    return [float(c == a) for c, a in zip(completions, column)]

def fractional(completions):
    return [fractions.Fraction(1, 2)] * len(completions)

class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def silent(completions):
    raise Silent

def long(completions):
    raise ValueError("x" * 10**6)

class Number:
    __float__ = None
    __str__ = Silent.__str__

def nameless(completions):
    return [Number()] * len(completions)
"""


@pytest.fixture(params=["process", "thread"])
def total(request, tmp_path):
    """Scores two responses by a function of MODULE, of which the first has the value of its column."""
    (tmp_path / "odd.py").write_text(MODULE)

    def total(name: str) -> list[float]:
        loaded = load_rewards({"r": RewardConfig(f"{tmp_path / 'odd.py'}:{name}", isolation=request.param)})
        try:
            return score(loaded, ["p", "q"], ["1", "2"], {"column": ["1", "3"]}).total.tolist()
        finally:
            close_rewards(loaded)

    return total


@pytest.mark.parametrize(("name", "wanted"), [("judge", [1, 0]), ("by_place", [1, 0]), ("fractional", [0.5, 0.5])])
def test_unusual_functions_are_called_as_they_mean(name, wanted, total):
    """Attributes that built-in rewards have are a user's own, and an argument that is left out keeps its place."""
    assert total(name) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [("silent", r"Silent: \(its text cannot be read\)"), ("long", "ValueError: xxx"), ("nameless", r"\(Number\) for")],
)
def test_errors_and_values_that_cannot_print_themselves_are_named(name, message, total):
    with pytest.raises(RewardError, match=message) as refused:
        total(name)
    assert len(str(refused.value)) < 10_000


class Lies(list):
    def __len__(self):
        return 4


class Frame:
    """As a DataFrame: its length is that of its rows, and it gives the names of its columns."""

    columns = (0, 1, 2, 3)
    __len__, __iter__ = lambda self: 4, lambda self: iter(self.columns)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.array(1.0), "returned '1.0'; expected a list of 4 numbers"),
        ((1.0 for _ in range(4)), "returned '<generator .*; expected a list of 4 numbers"),
        (bytearray(4), "returned .*bytearray.*; expected a list of 4 numbers"),
        (Frame(), "returned '.*Frame.*; expected a list of 4 numbers"),
        (Lies(), "returned 0 values for 4 completions"),
        (Lies(range(9)), "returned 5 values for 4 completions"),
    ],
    ids=["array without an axis", "generator", "bytearray", "frame", "too few", "too many"],
)
def test_what_is_no_list_of_numbers_is_refused_by_name(returned, message):
    loaded = load_rewards({"r": RewardConfig("given")}, {"r": lambda completions: returned})
    with pytest.raises(RewardError, match=message):
        score(loaded, ["p"] * 4, ["1", "2", "3", "4"], {})


@pytest.mark.parametrize(
    ("function", "options", "meant"),
    [
        ("exact_match", {"colum": "gold"}, "column"),
        ("regex_match", {"pattren": "x"}, "pattern"),
        ("judge", {"model": "m", "api_key": "k"}, "key"),
    ],
)
def test_a_misspelt_option_of_a_built_in_reward_is_named(function, options, meant):
    """They take any column, and took any option: a judge was asked without its key."""
    if function == "judge":
        pytest.importorskip("openai", reason="the judge extra is not installed")
    with pytest.raises(ConfigError, match=rf"rewards.r.options.{[*options][-1]}: .*; did you mean {meant}\?"):
        load_rewards({"r": RewardConfig(function, options=options, isolation="thread")})


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "raise GeneratorExit", "raise ValueError('x' * 10**6)"])
def test_a_module_that_leaves_on_import_is_named(body, isolation, tmp_path):
    """sys.exit(0) ended gvpo train with status 0."""
    (tmp_path / "leaves.py").write_text(body)
    with pytest.raises(
        ConfigError, match=r"importing .*leaves.py failed: (SystemExit|GeneratorExit|ValueError)"
    ) as refused:
        load_rewards({"r": RewardConfig(f"{tmp_path / 'leaves.py'}:f", isolation=isolation)})
    assert len(str(refused.value)) < 5000


def test_a_module_that_changes_the_working_directory_of_the_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moves.py").write_text(
        "import os\nos.chdir('/')\ndef f(completions):\n    return [1] * len(completions)\n"
    )
    with pytest.raises(ConfigError, match="changed the working directory to /, "):
        load_rewards({"r": RewardConfig("moves.py:f", isolation="thread")})
    assert os.getcwd() == str(tmp_path)
    close_rewards(load_rewards({"r": RewardConfig("moves.py:f")}))  # in a process it is its own
