"""Distillation: a teacher replaces the reference (docs/distillation.md)."""

from gvpo_core.training.teacher.load import load_teacher
from gvpo_core.training.teacher.taught import Teacher

__all__ = ["Teacher", "load_teacher"]
