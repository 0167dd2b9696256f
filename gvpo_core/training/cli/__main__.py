import sys

from gvpo_core.training.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
