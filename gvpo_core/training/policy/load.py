"""Finds the backend of a run and loads its policy."""

import dataclasses
import importlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.config.backends import BACKENDS, in_few_bits, install_line, installable, refuse_settings
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.compiled import keep_compiled


def backend_of(config: Config) -> str:
    """Returns the backend that the settings name; for "auto", the first one that is installed.

    Raises: ConfigError: "auto", and no backend is installed.
    """
    if config.run.backend != "auto":
        return config.run.backend
    for backend in installable():
        if all(find_spec(module) for module in backend.needs):
            return backend.name
    raise ConfigError(f"no backend is installed: {install_line()}")


def missing_package(name: str, extra: str) -> list[str]:
    """Error lines for a package that is not installed; empty if it is installed."""
    return [] if find_spec(name) else [f'{name} is not installed: pip install "gvpo[{extra}]"']


def missing_of_backend(config: Config) -> list[str]:
    """Error lines for missing packages that the backend imports to load or save a model."""
    try:
        name = backend_of(config)
    except ConfigError as e:
        return [str(e)]
    if name not in BACKENDS:
        return []
    needs = BACKENDS[name].needs + (("peft",) if name == "torch" and config.model.lora_rank else ())
    missing = [line for package in needs for line in missing_package(package, name)]
    if name == "torch" and in_few_bits(config.model, config.optimizer):
        missing += missing_package("bitsandbytes", "bitsandbytes")
    return missing


def load_policy(config: Config, *, trained: bool = True) -> Policy:
    """Loads the configured model as a policy, ready to be trained or restored.

    Args:
      trained: False: the policy only scores and samples. The backend gets updates = 0, and holds the model in
        model.dtype without moments.
    Raises: ConfigError: a setting of another backend, a backend that is not installed, a model that cannot be used.
    """
    name = backend_of(config)
    refuse_settings(config.model, name, config.optimizer)
    if name == "jax":
        keep_compiled(os.environ)
    try:
        module = importlib.import_module(BACKENDS[name].module)
    except ImportError as e:
        raise ConfigError(f'gvpo_{name} cannot be imported ({e}): pip install "gvpo[{name}]"') from e
    policy: Policy = module.load(
        config.model,
        config.optimizer,
        updates=config.updates if trained else 0,
        reference=trained and config.objective.reference == "initial",
        seed=config.run.seed,
    )
    return policy


def check_policy(policy: Policy, config: Config) -> None:
    """Raises ConfigError if the policy was loaded with other settings than the run has."""
    loaded = policy.settings
    different = _differences("optimizer", loaded.optimizer, config.optimizer)
    if loaded.model is not None:
        different += _differences("model", loaded.model, config.model)
    if config.optimizer.schedule != "constant" and loaded.updates != config.updates:
        different.append(f"the schedule ends after {loaded.updates} updates, and the run has {config.updates}")
    if config.objective.reference == "initial" and not loaded.reference:
        different.append("it has no reference, and objective.reference is 'initial'")
    if config.model.lora_rank and loaded.seed != config.run.seed:
        different.append(f"run.seed is {loaded.seed}, and the run has {config.run.seed}")
    if different:
        raise ConfigError(
            f"the policy was loaded with other settings than this run's: {'; '.join(different)}. Load one for this run:"
            " load_policy(config)"
        )


def _differences(section: str, loaded: Any, configured: Any) -> list[str]:
    different = []
    for field in dataclasses.fields(configured):
        a, b = getattr(loaded, field.name), getattr(configured, field.name)
        if a != b and not (field.name == "path" and Path(a).absolute() == Path(b).absolute()):
            different.append(f"{section}.{field.name} is {a!r}, and the run has {b!r}")
    return different
