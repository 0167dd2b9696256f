"""The command line: gvpo train, eval, export, report, doctor."""

from gvpo_core.training.cli.commands import main

__all__ = ["main"]
