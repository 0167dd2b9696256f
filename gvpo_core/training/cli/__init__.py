"""The command line `gvpo`."""

from gvpo_core.training.cli.commands import main

__all__ = ["main"]
