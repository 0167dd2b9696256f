"""The command `gvpo` with a policy that says as many letters as its seed says, in the place of a model."""

import sys

from scripted_policy import ScriptedPolicy

from gvpo_core.training import cli
from gvpo_core.training.policy import load


def script(text: str, u: float) -> str:
    return "x" * (1 + int(9 * u))


if __name__ == "__main__":
    load.load_policy = lambda config: ScriptedPolicy(script, updates=config.updates, model=config.model.path)
    sys.exit(cli.main(sys.argv[1:]))
