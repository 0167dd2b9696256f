"""The console, under the module name that scripts import."""

from gvpo_core.training.watch.console import Console

__all__ = ["Console"]
