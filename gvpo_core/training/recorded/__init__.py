"""Recorded groups: prompts with scored responses, for training and evaluation without sampling."""

from gvpo_core.training.recorded.choice import recorded_beside, recorded_evaluation, recorded_training
from gvpo_core.training.recorded.groups import Group, Groups, encode_groups
from gvpo_core.training.recorded.reference import ReferenceScores, reference_file
from gvpo_core.training.recorded.rows import Recorded, RecordedRow, recorded_rows
from gvpo_core.training.recorded.shapes import shape_of
from gvpo_core.training.recorded.stream import Stream, StreamedGroups, stream_of

__all__ = [
    "Group",
    "Groups",
    "Recorded",
    "RecordedRow",
    "ReferenceScores",
    "Stream",
    "StreamedGroups",
    "encode_groups",
    "recorded_beside",
    "recorded_evaluation",
    "recorded_rows",
    "recorded_training",
    "reference_file",
    "shape_of",
    "stream_of",
]
