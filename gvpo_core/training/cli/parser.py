"""The argument parser of the commands."""

import argparse
from typing import NoReturn

from gvpo_core.training.terminal.text import printable


class Parser(argparse.ArgumentParser):
    """Parses a command's arguments. Error messages quote the arguments with control characters escaped."""

    def error(self, message: str) -> NoReturn:
        """See argparse.ArgumentParser."""
        super().error(printable(message, keep="\n"))
