"""10,000 generated settings, data and reward returns: a clean run, or one clear message, never a traceback from below.

Each kind is drawn by hypothesis from what is right, what is nearly right and what is anything at all, with fixed seeds.
Settings and data go through the command line itself, on the table policy; reward returns through the scoring of a step.
"""

import contextlib
import io
import json
import logging
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tomli_w", reason="the command line's extra is not installed")
hypothesis = pytest.importorskip("hypothesis")
import table_run
import tomli_w
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gvpo_core.training import cli
from gvpo_core.training.config import Config, RewardConfig
from gvpo_core.training.config.file import as_table
from gvpo_core.training.data import DataError, load_rows
from gvpo_core.training.rewards import RewardError, close_rewards, load_rewards, score

pytestmark = pytest.mark.core

CONFIGS, DATASETS, REWARDS = 150, 150, 700
# Generated inputs: 1,000, or 10,000 in the full run.
more = pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])


def cases(count: int):
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """The log of thousands of runs is not kept."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


TEXT = st.text(max_size=8)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
WITHOUT_NONE = ANYTHING.filter(lambda value: "null" not in json.dumps(value))  # TOML has no null
NUMBERS = st.sampled_from((0, 1, 2, 3, -1, 0.0, 0.5, 1.0, 2.5, -0.5, 1e-9, 1e300, math.nan, math.inf, -math.inf, 2**53,
                           10**400, True))  # fmt: skip
BASE = {
    "run": {"backend": "table", "steps": 1, "checkpoint_every": 0, "show_every": 1},
    "rollout": {"prompts": 2, "responses": 4, "max_tokens": 2},
    "objective": {"beta": 0.5},
    "optimizer": {"learning_rate": 0.1},
    "rewards": {"right": {"function": "exact_match", "isolation": "thread", "timeout": 5.0}},
}
SECTIONS = as_table(Config())
# Sizes that a computer would take literally: left to the tests of their limits.
SIZES = {"steps", "prompts", "responses", "epochs", "workers", "memory", "folder", "trackers", "backend", "path"}


def right_kind(default):
    """Values of a setting's type, of which most can be run."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int | float):
        return st.one_of(st.just(default), NUMBERS)
    if isinstance(default, list):
        return st.lists(NUMBERS | TEXT, max_size=3)
    return st.sampled_from(("auto", "packed", "rollout", "grpo", "dpo", "rloo", "sft", "cosine", "linear", "score", ""))


@st.composite
def changes(draw):
    """(section, key, value) to put into BASE, in the order of their likelihood: right, nearly right, anything."""
    section = draw(st.sampled_from(sorted(SECTIONS)))
    known = SECTIONS[section] if section != "rewards" else as_table(RewardConfig())
    key = draw(st.sampled_from([k for k in sorted(known) if k not in SIZES]))
    kind = draw(st.sampled_from(("right", "right", "right", "any", "misspelt", "section")))
    if kind == "misspelt":
        return section, draw(st.sampled_from((key[:-1], key + "s", key.upper(), "", "a.b", "größe"))), draw(NUMBERS)
    if kind == "section":
        return draw(st.sampled_from((section, section[:-1], section + "x", "rewards"))), None, draw(WITHOUT_NONE)
    return section, key, draw(WITHOUT_NONE if kind == "any" else right_kind(known[key]))


def run(arguments):
    """(exit status, standard error) of the command line in this process."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = cli.main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code
    return status, errors.getvalue()


@pytest.fixture(scope="module")
def place():
    """A folder for one run at a time, in memory where the machine has such a place: runs sync what they write."""
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(dir=where))
    table_run.make(folder)
    yield folder
    shutil.rmtree(folder)


def answered(place, config: Path) -> str:
    """Runs the config; asserts a clean run or a clear message. Returns the message, empty after a clean run."""
    shutil.rmtree(place / "run", ignore_errors=True)
    status, errors = run(["train", config])
    assert "Traceback" not in errors, errors
    if status == 0:
        assert (place / "run" / "metrics.jsonl").stat().st_size > 0
        return ""
    assert status in (1, 2), (status, errors)
    assert errors.startswith("gvpo: ") and len(errors) > 20, errors
    return errors


@more
def test_generated_settings(place, times):
    clean = refused = 0

    @given(st.lists(changes(), min_size=1, max_size=3))
    @cases(CONFIGS * times)
    def check(changed):
        nonlocal clean, refused
        table = json.loads(json.dumps(BASE))
        table["run"]["folder"], table["model"] = str(place / "run"), {"path": str(place)}
        table["data"] = {"train": str(place / "train.jsonl")}
        for section, key, value in changed:
            if key is None:
                table[section] = value
            elif section == "rewards":
                if isinstance(table["rewards"], dict) and isinstance(table["rewards"].get("right"), dict):
                    table["rewards"]["right"][key] = value
            elif isinstance(table.setdefault(section, {}), dict):
                table[section][key] = value
        try:
            text = tomli_w.dumps(table)
        except (TypeError, ValueError, UnicodeError):  # no TOML says this
            return
        config = place / "config.toml"
        config.write_bytes(text.encode("utf-8", "surrogatepass"))
        message = answered(place, config)
        clean, refused = clean + (not message), refused + bool(message)

    check()
    assert clean > CONFIGS // 20 and refused > CONFIGS // 5, (clean, refused)


PROMPTS = st.sampled_from(("p0", "p1", "p2", "p9", "", " ", "\n", 3, None, [], {}, [{}], [{"role": "user"}], [3],
                           [{"role": "user", "content": "p0"}], [{"role": 1, "content": None}]))  # fmt: skip
ROWS = st.fixed_dictionaries({}, optional={"prompt": PROMPTS, "answer": ANYTHING, "completion_ids": ANYTHING})
GOOD_ROWS = st.fixed_dictionaries({"prompt": st.sampled_from(("p0", "p1", "p2")), "answer": ANYTHING})


@st.composite
def files(draw):
    """The bytes of a .jsonl file: rows, perhaps with something among them that is none, perhaps cut or recoded."""
    rows = draw(st.lists(draw(st.sampled_from((GOOD_ROWS, GOOD_ROWS, ROWS))), max_size=4))
    lines = [json.dumps(row, allow_nan=True) for row in rows]
    if draw(st.integers(0, 3)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(("", "{", "3", "null", "[1]", '"p0"', "NaN",
                     "[" * 4000, '{"prompt": "p0"', '{"prompt": "\\ud800"}', "\x00", "{'prompt': 'p0'}"))))  # fmt: skip
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    ending = draw(st.sampled_from((b"", b"\n", b"\n", b"\xff\xfe", b"\r\n")))
    return content[: draw(st.sampled_from((len(content), len(content), len(content) // 2)))] + ending


@more
def test_generated_datasets(place, times):
    clean = refused = 0
    config = place / "data.toml"
    table = json.loads(json.dumps(BASE))
    table["run"]["folder"], table["model"] = str(place / "run"), {"path": str(place)}
    table["data"] = {"train": str(place / "generated.jsonl")}
    config.write_text(tomli_w.dumps(table))

    @given(files())
    @cases(DATASETS * times)
    def check(content):
        nonlocal clean, refused
        (place / "generated.jsonl").write_bytes(content)
        message = answered(place, config)
        clean, refused = clean + (not message), refused + bool(message)

    check()
    assert clean > DATASETS // 20 and refused > DATASETS // 5, (clean, refused)


class Odd:
    """No number, and unwilling to be anything else."""

    def __repr__(self) -> str:
        raise ValueError("no text")

    __str__ = __repr__


class Number(float):
    pass


ODD = st.sampled_from((Odd(), object(), math.nan, math.inf, -math.inf, np.float32(0.5), np.nan, np.int8(3),
                       np.array(2.0), np.array([1.0, 2.0]), Number(0.25), 10**400, 1j, b"1", "1", "0.5", "good", True,
                       None, range(3),
                       {1: 2}, [0.5], (1.0,), iter([1.0]), Exception("x"), "\ud800", len))  # fmt: skip
FINE = st.floats(-5, 5) | st.none() | st.integers(-3, 3)


@st.composite
def returns(draw):
    """What a reward gives for four responses, and whether it gives it or raises it."""
    kind = draw(st.sampled_from(("fine", "fine", "odd value", "odd value", "wrong count", "odd", "array", "raise")))
    if kind == "odd":
        return draw(ODD), False
    if kind == "raise":
        error = draw(
            st.sampled_from((ValueError, KeyError, SystemExit, KeyboardInterrupt, RecursionError, MemoryError))
        )
        return error(draw(TEXT)), True
    values = draw(st.lists(FINE, min_size=4, max_size=4))
    if kind == "odd value":
        values[draw(st.integers(0, 3))] = draw(ODD)
    if kind == "wrong count":
        values = values[: draw(st.integers(0, 3))]
    if kind == "array":
        array = np.asarray([0.5 if v is None else v for v in values])
        return draw(st.sampled_from((array, array[:2], array[:, None], array.astype(object), array.astype(str)))), False
    return draw(st.sampled_from((values, tuple(values)))), False


@more
def test_generated_reward_returns(times):
    seen = {"scored": 0, "refused": 0}

    @given(st.lists(returns(), min_size=1, max_size=2), st.sampled_from((None, None, -1.0)))
    @cases(REWARDS * times)
    def check(given_back, failure_value):
        def reward_of(value, raises):
            def reward(prompts, completions, **columns):
                if raises:
                    raise value
                return value

            return reward

        functions = {f"r{i}": reward_of(*pair) for i, pair in enumerate(given_back)}
        config = {name: RewardConfig("given", timeout=5.0, failure_value=failure_value) for name in functions}
        loaded = load_rewards(config, functions)
        try:
            scores = score(loaded, ["p"] * 4, ["a", "b", "c", "d"], {})
        except RewardError as e:
            refused = str(e).splitlines()[0]
        else:
            refused = ""
            for values in (scores.total, *scores.parts.values()):
                assert values.shape == (4,) and not np.isinf(values).any()
            assert np.isfinite(scores.total).any() or any(np.isfinite(v).any() for v in scores.parts.values())
        finally:
            close_rewards(loaded)
        assert not refused or (refused.startswith("reward r") and len(refused) > 20), refused
        seen["refused" if refused else "scored"] += 1

    check()
    assert min(seen.values()) > REWARDS // 5, seen


@pytest.mark.parametrize("name", ["folder", "none", "text.txt", "broken.parquet", "secret.jsonl"])
def test_other_sources_are_answered_too(name, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("p0")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "secret.jsonl").mkdir()
    with pytest.raises(DataError, match=name):
        load_rows(str(tmp_path / name), "data.train")
