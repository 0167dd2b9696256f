"""Columns on their way to a reward's process arrive equal, with their types, or are refused by name."""

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import json
import uuid
import zoneinfo

import numpy as np
import pytest

from gvpo_core.training.config import RewardConfig
from gvpo_core.training.rewards import RewardError, close_rewards, load_rewards, score
from gvpo_core.training.rewards.worker.encoding import UnsendableError, decode, encode

pytestmark = pytest.mark.core

BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
VALUES = [
    None, True, 0, -1, 1.5, "text", "\ud800", "é", "", [], {}, (), (1, (2, "x")), [1, [2, (3,)]],
    {1: 2, (1, 2): [None]}, {"tuple": [1]}, [{"dict": []}], {"int": 5}, {True: 1, None: 2, 1.5: 3},
    b"\x00\xff", bytearray(b"a"), {1, 2, 3},
    frozenset({(1, 2)}), 2**63, -(2**63), 2**63 - 1, 10**5000, [1, 2**70], float("inf"), float("-inf"), float("nan"),
    -0.0, [float("nan"), 1], 5e-324, 3 + 4j, range(1, 10, 2), decimal.Decimal("1.10"), decimal.Decimal("NaN"),
    fractions.Fraction(10**30, 7), uuid.UUID(int=5), dt.date(2024, 2, 29), dt.datetime(2024, 1, 1, 3, 4, 5, 6),
    dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
    dt.datetime(2024, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30), "IST")), dt.time(1, 2, 3),
    dt.timedelta(days=-1, microseconds=3), collections.OrderedDict(b=1, a=2), collections.Counter("abca"),
    collections.deque([1, (2,)]), np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3).T, np.array(3.5),
    np.zeros((0, 3)), np.float32(1.5), np.int64(7), np.bool_(True), np.str_("abc"), np.array(["a", "bé"]),
    np.str_("a\0"), np.bytes_(b"a\0"), np.str_(""),
    np.array([b"x"]), np.array([1, 2], ">i4"), np.float16(1), np.array(["2024-01-01"], "datetime64[D]"),
    np.datetime64("2024-01-01T00:00:01"), np.array([1, "a", (1, 2), None], dtype=object), np.array([1 + 2j]),
]  # fmt: skip


def same(a, b) -> bool:
    """Equal values of equal types all the way down; NaN is equal to NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and all(map(same, a.ravel().tolist(), b.ravel().tolist()))
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return all(map(same, a, b)) and len(a) == len(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float | decimal.Decimal) and a != a:
        return b != b
    if isinstance(a, dt.datetime):
        return (a.replace(tzinfo=None), a.fold, str(a.tzinfo)) == (b.replace(tzinfo=None), b.fold, str(b.tzinfo))
    return a == b and (not isinstance(a, float) or np.signbit(a) == np.signbit(b))


def test_values_arrive_equal_and_of_the_same_type():
    changed = [i for i, v in enumerate(VALUES) if not same(v, decode(json.loads(json.dumps(encode(v)))))]
    assert not changed, [type(VALUES[i]) for i in changed]


@pytest.mark.parametrize("text", ["9999-01-01", "1600-02-29 01:02:03.000004", "2024-10-27 02:30"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_timestamps_of_pandas_arrive_equal_in_any_year(text, zone):
    """Nanoseconds, which hold the years 1678 to 2261, are not their default unit any more."""
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    for unit in ("s", "us"):
        stamp = pandas.Timestamp(text).as_unit(unit)
        value = stamp if zone is None else stamp.tz_localize(zone, ambiguous=False)
        back = decode(json.loads(json.dumps(encode(value))))
        assert type(back) is type(value) and back == value
        assert (back.unit, str(back.tzinfo)) == (value.unit, str(value.tzinfo))


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int = 1


Pair = collections.namedtuple("Pair", "a b")
loop: list = []
loop.append(loop)
deep: list = []
for _ in range(5000):
    deep = [deep]


class Text(str):
    __slots__ = ()


REFUSED = {
    "IntEnum": (Colour.RED, "Colour"), "dataclass": (Point(), "Point"), "named tuple": (Pair(1, 2), "Pair"),
    "loop": (loop, "deeper than 100"), "deep": (deep, "deeper than 100"), "object": (object(), "builtins.object"),
    "str subclass": (Text("a"), "Text"), "masked array": (np.ma.array([1, 2], mask=[0, 1]), "MaskedArray"),
    "records": (np.zeros(2, [("a", int)]), "dtype"), "defaultdict": (collections.defaultdict(list), "defaultdict"),
    "function": (len, "builtin_function"), "within": ({"a": [(1, Point())]}, "Point"),
    "bounded deque": (collections.deque([1], maxlen=1), "deque"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_is_refused(name):
    value, message = REFUSED[name]
    with pytest.raises(UnsendableError, match=message):
        encode(value)


FILE = """
import datetime, decimal
def reward(prompts, completions, **columns):
    print(sorted(columns))
    return [float(repr({k: v[i] for k, v in columns.items()}) == c) for i, c in enumerate(completions)]
def one(completions, good): return [float(len(c)) for c in completions]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "columns_reward.py"
    path.write_text(FILE)
    return path


def test_a_process_sees_what_a_thread_sees(file):
    columns = {
        "table": [{7: 1.0, (1, 2): "x"}] * 2, "board": [((1, 2), (3, 4)), ()], "when": [dt.date(2024, 1, 2), None],
        "price": [decimal.Decimal("1.10"), 10**30], "raw": [b"\xff", bytearray(b"x")], "a-b": [{1, 2}, 3j],
        "class": [float("inf"), -0.0], "completion_ids": [[1, 2], [3]],
    }  # fmt: skip
    wanted = [repr({k: v[i] for k, v in columns.items()}) for i in range(2)]
    for isolation in ("process", "thread"):
        loaded = load_rewards({"r": RewardConfig(f"{file}:reward", isolation=isolation)})
        try:
            assert score(loaded, ["a", "b"], wanted, columns).total.tolist() == [1.0, 1.0], isolation
        finally:
            close_rewards(loaded)


def test_prompts_arrive_equal_and_options_keep_their_types(tmp_path):
    file = tmp_path / "typed.py"
    file.write_text(
        "def r(prompts, completions, target, when, ks, on):\n"
        "    print(prompts)\n"
        "    options = repr((target, when, ks, on)) == '(50, datetime.date(2024, 1, 1), [1, 2], True)'\n"
        "    return [float(options and repr(p) == c[0]['content']) for p, c in zip(prompts, completions)]\n"
    )
    options = {"target": 50, "when": dt.date(2024, 1, 1), "ks": [1, 2], "on": True}
    chat = [{"role": "user", "content": "hi", "tool_calls": (1, {2: 3})}]
    for isolation in ("process", "thread"):
        loaded = load_rewards({"r": RewardConfig(f"{file}:r", isolation=isolation, options=options)})
        try:
            assert score(loaded, [chat], [repr(chat)], {}).total.tolist() == [1.0], isolation
        finally:
            close_rewards(loaded)


def test_only_columns_that_the_function_takes_must_be_sendable(file):
    columns = {"good": [1, 2], "odd": [3, Point()], "completion_ids": [[1], [1]]}
    loaded = load_rewards({"r": RewardConfig(f"{file}:reward"), "s": RewardConfig(f"{file}:one")})
    try:
        with pytest.raises(RewardError, match=r"column 'odd' of response 1 .*Point; .*isolation = 'thread'"):
            score(loaded[:1], ["a", "b"], ["x", "yy"], columns)
        assert score(loaded[1:], ["a", "b"], ["x", "yy"], columns).total.tolist() == [1.0, 2.0]
    finally:
        close_rewards(loaded)


@pytest.mark.parametrize("value", [loop, deep], ids=["loop", "deep"])
def test_a_column_that_cannot_be_copied_for_a_thread_is_named(value):
    """It ended in a RecursionError of each response."""
    rewards = {
        "r": lambda completions, odd: [1.0] * len(completions),
        "s": lambda completions: [2.0] * len(completions),
    }
    loaded = load_rewards({name: RewardConfig(f"{name}:given") for name in rewards}, rewards)
    try:
        with pytest.raises(RewardError, match=r"reward r: column 'odd' nests too deep to be copied"):
            score(loaded[:1], ["a"], ["x"], {"odd": [value]})
        assert score(loaded[1:], ["a"], ["x"], {"odd": [value]}).total.tolist() == [2.0]
    finally:
        close_rewards(loaded)


def test_what_a_reward_changes_in_its_arguments_changes_nothing_for_others():
    """In threads rewards shared the objects of the data: one that takes off the last test left fewer to later steps."""
    seen: list[str] = []

    def changing(prompts, completions, tests, table, codes):
        seen.append(repr((prompts, completions, tests, table, codes)))
        for row, chat in enumerate(completions):
            chat[0]["content"] = "changed"
            prompts[row][0]["content"] = "changed"
            tests[row].pop()
            table[row]["x"].clear()
            codes[row][:] = 0
        return [1.0] * len(completions)

    shared = ["one", ["two"]]
    columns = {"tests": [shared, shared], "table": [{"x": {1: 2}}] * 2, "codes": [np.arange(3)] * 2}
    chats = [[{"role": "user", "content": "p"}]] * 2
    for rewards in ({"a": changing}, {"a": changing, "b": changing}):
        loaded = load_rewards({name: RewardConfig(f"{name}:given") for name in rewards}, rewards)
        try:
            for _ in range(2):
                assert score(loaded, chats, ["x", "y"], columns).total.tolist() == [float(len(rewards))] * 2
        finally:
            close_rewards(loaded)
    assert len(seen) == 6 and len({*seen}) == 1 and "changed" not in seen[0] and "two" in seen[0]
    assert shared == ["one", ["two"]] and columns["codes"][0].tolist() == [0, 1, 2] and chats[0][0]["content"] == "p"


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_an_option_that_a_reward_changes_is_the_same_at_the_next_call(isolation, tmp_path):
    file = tmp_path / "popping.py"
    file.write_text("def r(completions, ks):\n    return [float(ks.pop()) for _ in completions]\n")
    config = RewardConfig(f"{file}:r", isolation=isolation, workers=1, options={"ks": [1, 2]})
    loaded = load_rewards({"r": config})
    try:
        assert [score(loaded, ["a"], ["x"], {}).total.tolist() for _ in range(3)] == [[2.0]] * 3
    finally:
        close_rewards(loaded)
