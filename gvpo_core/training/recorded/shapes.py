"""Which of the known shapes recorded data has, said by its columns alone."""

from collections.abc import Collection
from typing import NamedTuple


class Shape(NamedTuple):
    """One way in which people store scored responses."""

    name: str
    description: str  # for the header and messages
    needs: tuple[str, ...]  # columns that every row has a value in
    compares: bool  # its rewards say which response is better, not which to imitate


RUN = Shape("run", "the completions of a run of gvpo", ("kind", "step", "group", "response", "reward"), False)
GROUPS = Shape("groups", "groups: responses, rewards", ("responses", "rewards"), False)
DEMONSTRATIONS = Shape("demonstrations", "demonstrations: responses without rewards", ("responses",), False)
PAIRS = Shape("pairs", "preference pairs: chosen, rejected", ("chosen", "rejected"), True)
COMPLETIONS = Shape("completions", "UltraFeedback: completions with scores", ("completions",), False)
LABELS = Shape("labels", "unpaired preferences: completion, label", ("completion", "label"), True)
COMPLETION = Shape("completion", "demonstrations: completion", ("completion",), False)

# In this order: the first whose columns are there.
SHAPES = (RUN, GROUPS, PAIRS, LABELS, COMPLETIONS, DEMONSTRATIONS, COMPLETION)
SCORES = (  # columns of the scores of chosen and rejected
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
WHOLE = (RUN, LABELS)  # a group is made of several rows: all of them must be held
UNSCORED = (DEMONSTRATIONS, COMPLETION)  # only the objective sft reads them


def shape_of(columns: Collection[str]) -> Shape | None:
    """The shape of rows with these columns; None: they hold no recorded responses."""
    return next((shape for shape in SHAPES if {*shape.needs} <= {*columns}), None)
