"""Compares the RoPE of Tunix's models with the folder they were loaded from.

Llama in Tunix 0.1.7 ignores its `rope_theta`: every Llama uses the default of `apply_rope`, 1e6.
"""

import functools
import json
import threading
import types
from pathlib import Path
from typing import Any

import jax
from tunix.models.llama3 import model as llama

from gvpo_core.hosts import SettingsError
from gvpo_core.training.policy.hugging_face import rope_settings

_block = llama.Attention.block
_mending = threading.Lock()


def mend_llama() -> bool:
    """Makes Tunix's Llama use its `config.rope_theta` in this process. Returns False if it was already done.

    Tunix's block runs unchanged, with an `apply_rope` that has the theta of the layer's configuration.
    """
    with _mending:
        if llama.Attention.block is not _block:
            return False
        llama.Attention.block = _block_with_theta
        jax.clear_caches()  # programs traced with the wrong theta
        return True


@functools.cache
def _bound(theta: float) -> types.FunctionType:
    with_theta = vars(llama) | {"apply_rope": functools.partial(llama.apply_rope, rope_theta=theta)}
    return types.FunctionType(_block.__code__, with_theta, _block.__name__, _block.__defaults__, _block.__closure__)


def _block_with_theta(self: Any, *arguments: Any, **options: Any) -> Any:
    return _bound(self.config.rope_theta)(self, *arguments, **options)


def mend_and_check(model: Any, model_path: str | Path | None) -> None:
    """Corrects a Llama, and compares any model with its folder. `model_path` None: there is no folder."""
    if isinstance(model, llama.Llama3) and model.config.rope_theta != 1_000_000:
        mend_llama()
    if model_path is not None:
        check_rope(model, model_path)


def check_rope(model: Any, model_path: str | Path) -> None:
    """Compares the model's rope_theta with config.json's.

    Raises: SettingsError: they differ, or config.json asks for a RoPE scaling that Tunix's models do not have.
    """
    path = Path(model_path) / "config.json"
    if not path.is_file():
        raise SettingsError(
            f"model_path = {str(model_path)!r} has no config.json; give the model's Hugging Face folder"
        )
    theta = getattr(model.config, "rope_theta", None)
    if theta is None:
        raise SettingsError(
            f"{type(model).__name__} has no rope_theta to compare with {path}; check its RoPE by hand and give"
            " model_path = None"
        )
    expected = rope_settings(json.loads(path.read_text(encoding="utf-8")))
    if expected["rope_type"] != "default":
        raise SettingsError(
            f"{path} asks for rope_type {expected['rope_type']!r}, and Tunix's {type(model).__name__} has no RoPE"
            " scaling: its log-probs belong to another model. To train that model anyway, give model_path = None"
        )
    if float(theta) != expected["rope_theta"]:
        raise SettingsError(
            f"the model's config.rope_theta is {theta}, and {path} asks for {expected['rope_theta']:g}: make the model"
            f" with dataclasses.replace(config, rope_theta={expected['rope_theta']:g})"
        )
