"""Runs the command `gvpo` as `python -m gvpo`."""

import sys

from gvpo_core.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
