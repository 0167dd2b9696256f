"""The columns of the console's rows: some in a terminal of 80 columns, all of them in one of 120 or more."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gvpo_core.training.config.check import RESERVED_REWARD_NAMES
from gvpo_core.training.terminal.output import encodable
from gvpo_core.training.terminal.text import LEFT, fit, percent, printable
from gvpo_core.training.terminal.text import columns as width_of
from gvpo_core.training.watch.alerts import LEVELS

WIDE = 120  # columns of a terminal from which on rows have all fields
Record = Mapping[str, Any]


class Column(NamedTuple):
    """One field of a row."""

    title: str
    width: int
    text: Callable[[Record, int], str]  # formats a record's value in at most `width` characters
    meaning: str  # the key of metrics.jsonl, or the expression of keys
    legend: str = ""  # meaning in words


def _number(title: str, width: int, key: str, legend: str = "") -> Column:
    return Column(title, width, lambda record, width: fit(record.get(key), width), key, legend)


def _signed(record: Record, width: int) -> str:
    value = record.get("reward/trend")
    if value is None:
        return "-"
    text = fit(abs(value), width - 1)
    return text if text in ("-", "0") else f"{'-' if value < 0 else '+'}{text}"


def _dead(record: Record, width: int) -> str:
    counted, dead = record.get("groups/counted"), record.get("groups/all_equal", 0)
    best, worst = record.get("groups/all_best", 0), record.get("groups/all_worst", 0)
    if not counted or "groups/all_equal" not in record:
        return "-"
    if best + worst < dead:  # some groups have equal rewards between best and worst, or all rewards are equal
        return percent(dead / counted)
    return f"{percent(best / counted)}/{percent(worst / counted)}"


def _cut(record: Record, width: int) -> str:
    return f"{percent(record.get('episodes/turns'))}/{percent(record.get('episodes/tokens'))}"


_DEAD = "groups/all_best / groups/all_worst by groups/counted"
_CUT = Column(
    "cut%", 4, lambda record, width: percent(record.get("truncated")), "truncated", "responses cut at the token limit"
)
_CUT_EPISODES = Column(
    "cut%", 5, _cut, "episodes/turns / episodes/tokens", "episodes cut at the turn limit/at the token limit"
)
_DRIFT = "KL to the reference, nats a response"
_ENTROPY = "of the policy, nats a token"
_LENGTH = "mean tokens of a response"
COLUMNS = (
    _number("step", 5, "step"),
    _number("reward", 6, "reward/mean", "mean of the step"),
    Column("trend", 5, _signed, "reward/trend", "reward against the 10 steps before"),
    _number("spread", 6, "reward/spread", "of the rewards inside groups"),
    Column("dead%", 6, _dead, _DEAD, "groups with all responses best/worst (one number: equal otherwise)"),
    _CUT,
    _number("len", 5, "length/mean", _LENGTH),
    _number("kl", 5, "kl", _DRIFT),
    _number("entr", 5, "entropy", f"entropy {_ENTROPY}"),
    _number("sec", 4, "seconds/step", "seconds of the step"),
    _number("tok/s", 5, "tokens_per_second", "response tokens a second"),
)
ALL_COLUMNS = (
    *COLUMNS[:2],
    _number("+-", 5, "reward/half_width", "half of the 95 % interval of reward"),
    *COLUMNS[2:6],
    _number("length", 6, "length/mean", _LENGTH),
    COLUMNS[7],
    _number("entropy", 7, "entropy", _ENTROPY),
    _number("gradient", 8, "gradient_norm", "its norm before clipping"),
    _number("regret", 6, "regret/series", "reward still to gain at this KL penalty"),
    *COLUMNS[9:],
)
_GAP = _number("gap", 6, "sampler/gap", "between sampler and policy, nats a token")
_REWARD = "mean of this reward"  # legend of a reward's own column


def legend(columns: Sequence[Column]) -> str:
    """Explains the columns of a row, in their order."""
    sentences = [f"{column.title}: {column.legend}." for column in columns if column.legend not in ("", _REWARD)]
    if names := [column.title for column in columns if column.legend == _REWARD]:
        sentences.append(f"{', '.join(names)}: {_REWARD}.")
    return " ".join([*sentences, "left: time left. ~0: nearly 0."])


def columns_for(width: int, record: Record, stream: Any = None) -> tuple[Column, ...]:
    """The columns of rows in a terminal of `width` columns.

    If there is room, they include one for each of several rewards and one for the sampler's gap.

    Args:
      record: a train record: it has the names of the rewards and, for episodes, the shares of how they ended.
      stream: the stream that rows are written to; titles use its encoding. None: UTF-8.
    """
    if "episodes/turns" in record:
        chosen = _responses_columns(width - 1, record, stream)
        return tuple(_CUT_EPISODES if column is _CUT else column for column in chosen)
    return _responses_columns(width, record, stream)


def _responses_columns(width: int, record: Record, stream: Any) -> tuple[Column, ...]:
    if width < WIDE - 1:
        return COLUMNS
    names = [key.removeprefix("reward/") for key in record if key.startswith("reward/")]
    names = [name for name in names if name not in RESERVED_REWARD_NAMES]
    reward_columns: list[Column] = []
    room = width - width_of(titles(ALL_COLUMNS))
    gap = (_GAP,) if "sampler/gap" in record and room > 7 else ()
    room -= 7 * len(gap)
    for name in names if len(names) > 1 else ():
        title = encodable(printable(name), stream)
        column_width = max(6, width_of(title))
        if column_width + 1 <= room:
            reward_columns.append(_number(title, column_width, f"reward/{name}", _REWARD))
            room -= column_width + 1
    place = next(i for i, column in enumerate(ALL_COLUMNS) if column.title == "kl")
    return (*ALL_COLUMNS[:2], *reward_columns, *ALL_COLUMNS[2:place], *gap, *ALL_COLUMNS[place:])


def titles(columns: Sequence[Column] = COLUMNS) -> str:
    """The line of titles above the rows."""
    cells = [" " * (column.width - width_of(column.title)) + column.title for column in columns]
    return f"{' '.join(cells)} {'left':>{LEFT}} state"


def row(record: Record, left: str = "-", columns: Sequence[Column] = COLUMNS) -> str:
    """A step's record as a line of fixed width."""
    cells = [f"{column.text(record, column.width):>{column.width}}" for column in columns]
    return f"{' '.join(cells)} {left:>{LEFT}} {verdict(record)}"


def verdict(record: Record) -> str:
    """The worse of the record's verdicts on the training and on the machine; "-" if it has none."""
    verdicts = [record[key] for key in ("verdict", "machine/verdict") if key in record]
    return max(verdicts, key=LEVELS.index, default="-")
