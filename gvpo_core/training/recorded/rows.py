"""Converts recorded data of all shapes to one form. Needs no model, so mistakes are found before one is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_core.training.data import column_names
from gvpo_core.training.policy import Mask, Segment
from gvpo_core.training.recorded.conversation import answers, plain_list
from gvpo_core.training.recorded.segments import later_segments, read_masks
from gvpo_core.training.recorded.shapes import COMPLETIONS, GROUPS, LABELS, PAIRS, RUN, SCORES, UNSCORED, Shape
from gvpo_core.training.rewards.worker.encoding import LARGEST_REWARD
from gvpo_core.training.rows import DataError, Row

_SCORE_NAMES = ("score", "reward", "overall_score", "fine-grained_score")  # in UltraFeedback's completions
_OURS = ("finished", "prompt_ids", "response_ids", "response_mask", "response_segments", "reward_parts")


@dataclass(frozen=True)
class RecordedRow:
    """One prompt and k >= 0 responses."""

    where: str  # "data.train row 3", for messages
    prompt: Any  # as in the data
    responses: Sequence[Any]  # k, text or token ids
    rewards: Sequence[float]  # k; NaN: unscored
    finished: Sequence[bool | None]  # k; None: the data does not say
    parts: Sequence[Mapping[str, float]] = ()  # k, or none; single rewards by name
    columns: Row = field(default_factory=dict)  # other columns of the row
    row: int = 0  # number of the row in the data
    prompt_ids: Sequence[int] | None = None  # of the prompt, if its messages alone would give other ids
    masks: Sequence[Mask | None] = ()  # k, or none; masks of the policy's own tokens. Default: all tokens
    stopped: Sequence[bool] = ()  # k, or none: ended by a stop text, without an end token
    later: Sequence[Sequence[Segment]] = ()  # k, or none: segments after the first; see `Response.later`


@dataclass(frozen=True)
class Recorded:
    """Recorded data."""

    shape: Shape
    scores: str  # where the rewards come from, in words
    rows: Sequence[RecordedRow]
    in_order: bool = False  # written by a run: the first epoch keeps the order of its steps

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def scored(self) -> bool:
        """Whether the data has rewards."""
        return self.shape not in UNSCORED


def recorded_rows(
    rows: Sequence[Row],
    shape: Shape,
    name: str = "data.train",
    *,
    prompt: str = "prompt",
    first: int = 0,
    columns: Sequence[str] = (),
) -> Recorded:
    """Reads rows as prompts with responses and rewards.

    Args:
      shape: shape of the rows; see `shape_of`.
      name: name of the data, for messages.
      prompt: column of the prompt.
      first: number of the first row.
      columns: columns of the complete data, if `rows` are only a part of it.
    Raises: DataError: a value that cannot be used, with its row and column; or rows of different kinds.
    """
    for i, row in enumerate(rows, first):
        missing = [column for column in shape.needs if column not in row or (row[column] is None and shape is not RUN)]
        if missing and not (shape is RUN and row.get("kind") not in (None, "train")):
            raise DataError(
                f"{name} row {i} has no value in the column {missing[0]!r}, and other rows have recorded responses"
                f" ({shape.description}); expected all rows with responses, or none: split the data"
            )
    columns = columns or column_names(rows)
    if shape is RUN:
        return _of_run(rows, name)
    if shape is LABELS:
        return Recorded(shape, "label: 1 or 0", _labelled(rows, name, prompt))
    scores, recorded = "", []
    for i, row in enumerate(rows, first):
        scores, recorded_row = _recorded_row(row, shape, columns, f"{name} row {i}", prompt, i)
        recorded.append(recorded_row)
    in_order = shape is GROUPS and {"kind", "step", "group"} <= {*columns}
    return Recorded(shape, scores, recorded, in_order=in_order)


def _recorded_row(
    row: Row, shape: Shape, columns: Sequence[str], where: str, prompt_column: str, number: int
) -> tuple[str, RecordedRow]:
    rest = {k: v for k, v in row.items() if k not in (*shape.needs, prompt_column, *_OURS)}
    prompt = row.get(prompt_column)
    parts: Sequence[Mapping[str, float]] = ()
    ids: list[int] | None = None
    if shape is not GROUPS:
        _refuse_ids(row, where)
    if shape is PAIRS:
        prompt, responses = answers(
            prompt, (row["chosen"], row["rejected"]), where, ("chosen", "rejected"), implicit=True
        )
        scores, rewards = _pair_rewards(row, columns, where)
    elif shape is COMPLETIONS:
        prompt = row.get("instruction") if prompt is None else prompt
        responses, rewards, scores = _scored_completions(row["completions"], where)
        prompt, responses = answers(prompt, responses, where, ("completions",) * len(responses))
    elif shape in UNSCORED:
        column = shape.needs[0]
        values = plain_list(row[column], f"{where}, column {column!r}") if column == "responses" else [row[column]]
        prompt, responses = answers(prompt, values, where, (column,) * len(values))
        row = row if column == "responses" else _as_lists(row)
        scores, rewards = "none: every response counts alike", [1.0] * len(responses)
    else:
        values = plain_list(row["responses"], f"{where}, column 'responses'")
        prompt, responses = answers(prompt, values, where, ("responses",) * len(values))
        rewards = plain_list(row["rewards"], f"{where}, column 'rewards'")
        scores = "rewards"
        responses = _with_ids(responses, row, where)
        if row.get("prompt_ids") is not None:
            ids = plain_list(row["prompt_ids"], f"{where}, column 'prompt_ids'")
        parts = _parts(row.get("reward_parts"), len(responses), f"{where}, column 'reward_parts'")
    if prompt is None:
        raise DataError(f"{where} has no column {prompt_column!r}; it has {', '.join(row)}")
    finished = _finished(row.get("finished"), len(responses), where)
    if len(rewards) != len(responses):
        raise DataError(f"{where} has {len(responses)} responses and {len(rewards)} rewards; expected equal numbers")
    checked = [_reward(r, f"{where}, column 'rewards', entry {j}") for j, r in enumerate(rewards)]
    for j, response in enumerate(responses):
        if response is None:
            raise DataError(f"{where}, response {j} is None; expected text or token ids")
    masks = read_masks(row.get("response_mask"), len(responses), where)
    later = later_segments(row.get("response_segments"), len(responses), where)
    return scores, RecordedRow(
        where, prompt, responses, checked, finished, parts, rest, number, ids, masks, later=later
    )


def _refuse_ids(row: Row, where: str) -> None:
    """Raises DataError if the row has token ids: they are not used for rows of this shape."""
    for column in ("prompt_ids", "response_ids"):
        if row.get(column) is not None:
            raise DataError(
                f"{where}, column {column!r}: token ids beside text are used only in rows with 'responses' and"
                " 'rewards'; give these columns, or leave this one out"
            )


def _finished(value: Any, count: int, where: str) -> list[bool | None]:
    column = f"{where}, column 'finished'"
    finished = [None] * count if value is None else plain_list(value, column)
    for j, ended in enumerate(finished):
        if ended is not None and not isinstance(ended, bool):
            raise DataError(f"{column}, entry {j} is {ended!r:.40}; expected true, false or null")
    if len(finished) != count:
        raise DataError(f"{where} has {count} responses and {len(finished)} finished; expected equal numbers")
    return finished


def _as_lists(row: Row) -> Row:
    """Puts the values of a single response into lists, if the row has them without a list."""

    def nested(value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        flat = isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value)
        return [value] if flat else value

    columns = {name: nested(row[name]) for name in ("response_mask", "response_segments") if name in row}
    finished = row.get("finished")
    alone = finished is not None and not isinstance(finished, list | tuple)
    return {**row, **columns, **({"finished": [finished]} if alone else {})}


def _pair_rewards(row: Row, columns: Sequence[str], where: str) -> tuple[str, list[Any]]:
    for chosen, rejected in SCORES:
        if chosen in columns and rejected in columns:
            values = [row.get(chosen), row.get(rejected)]
            for column, value in zip((chosen, rejected), values, strict=True):
                _reward(value, f"{where}, column {column!r}")
            return f"{chosen}, {rejected}", values
    if "margin" in columns:
        margin = _reward(row.get("margin"), f"{where}, column 'margin'")
        if not margin > 0:
            raise DataError(f"{where}, column 'margin' is {row.get('margin')!r}; expected a number above 0")
        return "margin and 0", [margin, 0.0]
    return "1 and 0", [1.0, 0.0]


def _scored_completions(completions: Any, where: str) -> tuple[list[Any], list[Any], str]:
    """Reads UltraFeedback's column. Returns the responses, their scores, and a description of the scores."""
    column = f"{where}, column 'completions'"
    if isinstance(completions, Mapping):  # `datasets` may store a list of records as a record of lists
        keys, values = list(completions), [plain_list(v, column) for v in completions.values()]
        completions = [dict(zip(keys, record, strict=False)) for record in zip(*values, strict=False)]
    completions = plain_list(completions, column)
    score_name: str | None = None
    responses, scores = [], []
    for j, completion in enumerate(completions):
        if not isinstance(completion, Mapping) or completion.get("response") is None:
            raise DataError(f"{column}, entry {j} has no response; expected {{'response': ..., 'score': ...}}")
        score_name = score_name or next((name for name in _SCORE_NAMES if name in completion), None)
        if score_name is None:
            raise DataError(f"{column}, entry {j} has no score; expected one of {', '.join(_SCORE_NAMES)}")
        responses.append(completion["response"])
        scores.append(completion.get(score_name))
    return responses, scores, f"completions' {score_name}" if score_name else "none"


def _labelled(rows: Sequence[Row], name: str, prompt_column: str) -> list[RecordedRow]:
    """Reads TRL's unpaired preferences: rows with the same prompt are a group."""
    groups: dict[str, list[tuple[int, Any, Any, float]]] = {}
    ended: list[bool | None] = []
    masks: list[Mask | None] = []
    later: list[Sequence[Segment]] = []
    for i, row in enumerate(rows):
        where = f"{name} row {i}"
        _refuse_ids(row, where)
        if not isinstance(row["label"], bool) and row["label"] not in (0, 1):
            raise DataError(f"{where}, column 'label' is {row['label']!r:.40}; expected true or false")
        prompt, responses = answers(row.get(prompt_column), (row["completion"],), where, ("completion",))
        if prompt is None:
            raise DataError(f"{where} has no column {prompt_column!r}; it has {', '.join(row)}")
        groups.setdefault(repr(prompt), []).append((i, prompt, responses[0], float(row["label"])))
        row_lists = _as_lists(row)
        ended += _finished(row_lists.get("finished"), 1, where)
        masks += read_masks(row_lists.get("response_mask"), 1, where) or [None]
        later += later_segments(row_lists.get("response_segments"), 1, where) or [()]
    left_out = (prompt_column, "completion", "label", *_OURS)
    return [
        RecordedRow(
            f"{name} row {members[0][0]}",
            members[0][1],
            [response for _, _, response, _ in members],
            [reward for _, _, _, reward in members],
            [ended[i] for i, *_ in members],
            columns={k: v for k, v in rows[members[0][0]].items() if k not in left_out},
            row=members[0][0],
            masks=[masks[i] for i, *_ in members] if any(masks[i] is not None for i, *_ in members) else (),
            later=[later[i] for i, *_ in members] if any(later[i] for i, *_ in members) else (),
        )
        for members in groups.values()
    ]


def _of_run(rows: Sequence[Row], name: str) -> Recorded:
    """Reads completions.jsonl of a run: one line per response, in the order of the steps."""
    groups: dict[tuple[int, int], list[tuple[int, Row]]] = {}
    for i, row in enumerate(rows):
        if row.get("kind") == "train":
            groups.setdefault((row["step"], row["group"]), []).append((i, row))
    if not groups:
        raise DataError(f"{name} holds no responses of training steps (kind = 'train')")
    recorded = []
    for members in groups.values():
        (first, head), where = members[0], f"{name} row {members[0][0]}"
        if not any("messages" in row for _, row in members):
            raise DataError(
                f"{where} does not say whether its prompt was chat messages: an older version of gvpo wrote it. Record"
                " the responses again with gvpo collect, or give rows with prompt, responses and rewards"
            )
        messages = next((row["messages"] for _, row in members if row.get("messages")), None)
        recorded.append(
            RecordedRow(
                where,
                messages or head.get("prompt"),
                [row.get("response_ids") or row["response"] for _, row in members],
                [
                    math.nan if row.get("left_out") else _reward(row["reward"], f"{name} row {i}, column 'reward'")
                    for i, row in members
                ],
                [False if row.get("stopped") else row.get("finished") for _, row in members],
                _parts([row.get("rewards") or {} for _, row in members], len(members), f"{where}, column 'rewards'"),
                row=first,
                prompt_ids=next((row["prompt_ids"] for _, row in members if row.get("prompt_ids")), None),
                masks=read_masks([row.get("response_mask") for _, row in members], len(members), where),
                later=later_segments([row.get("response_segments") for _, row in members], len(members), where),
                stopped=[bool(row.get("stopped")) for _, row in members],
            )
        )
    return Recorded(RUN, "the run's own rewards", recorded, in_order=True)


def _with_ids(responses: list[Any], row: Row, where: str) -> list[Any]:
    """Replaces texts with their token ids in column `response_ids`, if a text does not tokenize back to them."""
    if row.get("response_ids") is None:
        return responses
    ids = plain_list(row["response_ids"], f"{where}, column 'response_ids'")
    if len(ids) != len(responses):
        raise DataError(f"{where} has {len(responses)} responses and {len(ids)} response_ids; expected equal numbers")
    return [response if tokens is None else tokens for response, tokens in zip(responses, ids, strict=True)]


def _parts(value: Any, count: int, where: str) -> Sequence[Mapping[str, float]]:
    """Reads single rewards by name, one table per response; empty if the data has none."""
    if value is None:
        return ()
    tables = plain_list(value, where)
    if len(tables) != count or not all(isinstance(table, Mapping) for table in tables):
        raise DataError(f"{where} is {tables!r:.40}; expected {count} tables of a reward by its name, one a response")
    return [
        {str(name): _reward(reward, f"{where}, entry {j}, {name!r}") for name, reward in part.items()}
        for j, part in enumerate(tables)
    ]


def _reward(reward: Any, where: str) -> float:
    """Converts a reward to a float; NaN if it is None. Raises: DataError: it is not a usable number."""
    if reward is None:
        return math.nan
    if isinstance(reward, str | bytes) or not hasattr(reward, "__float__"):
        raise DataError(
            f"{where} is a {type(reward).__name__} ({reward!r:.40}); expected a number, or null for no score"
        )
    try:
        value = float(reward)
    except OverflowError:  # an integer of more than 308 digits
        value = math.inf
    if math.isinf(value):
        raise DataError(f"{where} is {value}; expected a finite number, or null for no score")
    if abs(value) > LARGEST_REWARD:
        raise DataError(f"{where} is {value:g}; expected a number within {LARGEST_REWARD:g}, or null for no score")
    return value
