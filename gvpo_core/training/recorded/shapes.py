"""Known shapes of recorded data, recognised by their columns."""

from collections.abc import Collection
from typing import NamedTuple


class Shape(NamedTuple):
    """A common way to store scored responses."""

    name: str
    description: str  # for the header and messages
    needs: tuple[str, ...]  # columns with a value in every row
    compares: bool  # rewards only say which response is better, not which to imitate


RUN = Shape("run", "the completions of a run of gvpo", ("kind", "step", "group", "response", "reward"), False)
GROUPS = Shape("groups", "groups: responses, rewards", ("responses", "rewards"), False)
DEMONSTRATIONS = Shape("demonstrations", "demonstrations: responses without rewards", ("responses",), False)
PAIRS = Shape("pairs", "preference pairs: chosen, rejected", ("chosen", "rejected"), True)
COMPLETIONS = Shape("completions", "UltraFeedback: completions with scores", ("completions",), False)
LABELS = Shape("labels", "unpaired preferences: completion, label", ("completion", "label"), True)
COMPLETION = Shape("completion", "demonstrations: completion", ("completion",), False)

# The first shape with all its columns present is used.
SHAPES = (RUN, GROUPS, PAIRS, LABELS, COMPLETIONS, DEMONSTRATIONS, COMPLETION)
SCORES = (  # columns of the scores of chosen and rejected
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
WHOLE = (RUN, LABELS)  # a group consists of several rows: all of them must be in memory
UNSCORED = (DEMONSTRATIONS, COMPLETION)  # only the objective sft reads them


def shape_of(columns: Collection[str]) -> Shape | None:
    """Returns the shape of rows with these columns; None if they hold no recorded responses."""
    return next((shape for shape in SHAPES if {*shape.needs} <= {*columns}), None)
