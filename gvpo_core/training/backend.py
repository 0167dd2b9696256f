"""Finds the backend of a run and loads its policy."""

import importlib

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.policy import Policy

_MODULES = {"torch": "gvpo_torch.policy", "table": "gvpo_core.training.table"}


def load_policy(config: Config) -> Policy:
    """The configured model as a policy, ready to be trained or restored.

    Raises: ConfigError: the backend is not installed, with the line that installs it; or what the backend's load says.
    """
    name = "torch" if config.run.backend == "auto" else config.run.backend
    try:
        module = importlib.import_module(_MODULES[name])
    except ImportError as e:
        raise ConfigError(f'gvpo_{name} cannot be imported ({e}): pip install "gvpo[{name}]"') from e
    policy: Policy = module.load(
        config.model,
        config.optimizer,
        updates=config.updates,
        reference=config.objective.reference == "initial",
        seed=config.run.seed,
    )
    return policy
