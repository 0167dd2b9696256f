"""The console, by the name under which scripts import it."""

from gvpo_core.training.watch.console import Console

__all__ = ["Console"]
