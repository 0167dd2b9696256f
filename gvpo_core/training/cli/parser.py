"""The options of a command."""

import argparse
from typing import NoReturn

from gvpo_core.training.terminal.text import printable


class Parser(argparse.ArgumentParser):
    """Parses a command's arguments. Its errors quote them, and hold nothing that commands a terminal."""

    def error(self, message: str) -> NoReturn:
        """See argparse.ArgumentParser."""
        super().error(printable(message, keep="\n"))
