"""python -m gvpo_core.training.cli: the command `gvpo`."""

import sys

from gvpo_core.training.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
