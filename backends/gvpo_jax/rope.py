"""Rotary position embedding: frequencies from config.json, and the rotation of queries and keys."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.hugging_face import rope_settings
from gvpo_jax.spec import Rope

TYPES = ("default", "linear", "llama3", "yarn", "proportional", "longrope", "dynamic")


def read_rope(config: Mapping[str, Any], kind: str, width: int, partial: bool) -> Rope:
    """Returns the rotary embedding of layers of type `kind` (full_attention, sliding_attention).

    Args:
      width: size of a head.
      partial: whether the family applies partial_rotary_factor, that is, rotates only the first part of a head.
    Raises: ConfigError: unsupported type or setting; the message names it.
    """
    parameters = config.get("rope_parameters") or {}
    nested = any(isinstance(value, Mapping) for value in parameters.values())
    outer, config = parameters if nested else None, dict(config)
    if outer is not None:
        if not isinstance(outer.get(kind), Mapping):
            raise ConfigError(f"rope_parameters of {config.get('model_type')} has no settings for {kind} layers")
        config |= {"rope_parameters": outer[kind], "rope_theta": None, "rope_scaling": None}
    rope = rope_settings(config)
    name = rope["rope_type"]
    if name not in TYPES:
        raise ConfigError(f"gvpo_jax does not know rope_type {name!r}; it knows {', '.join(TYPES)}")
    share = float(rope.get("partial_rotary_factor") or 1.0)
    if share != 1.0 and not partial and name != "proportional":
        raise ConfigError(
            f"partial_rotary_factor is {share}; gvpo_jax rotates whole heads in {config.get('model_type')} models"
        )
    try:
        return _rope(rope, config, width, share, rope if outer is None else outer)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"settings of rope_type {name} are missing or invalid: {error}") from error


def _rope(
    rope: Mapping[str, Any], config: Mapping[str, Any], width: int, share: float, outer: Mapping[str, Any]
) -> Rope:
    name, turning = rope["rope_type"], int(width * share)
    positions = config.get("max_position_embeddings")
    plain = rope["rope_theta"] ** -(np.arange(0, turning, 2, dtype=np.float64) / turning)
    if name == "proportional":  # angles for the whole head; the last ones are zero
        angles = int(share * width // 2)
        inverse = np.zeros(width // 2)
        inverse[:angles] = rope["rope_theta"] ** -(np.arange(0, 2 * angles, 2, dtype=np.float64) / width)
        return Rope(_floats(inverse / (rope.get("factor") or 1.0)))
    if name == "default":
        return Rope(_floats(plain))
    if name == "dynamic":  # not rescaled up to the length that the model was trained for
        return Rope(_floats(plain), limit=int(positions))  # type: ignore[arg-type]
    if name == "linear":
        return Rope(_floats(plain / rope["factor"]))
    original: Any = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    original = original or positions
    if name == "llama3":  # low frequencies are divided by `factor`, high ones kept, those between blended
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * plain / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return Rope(_floats((1 - kept) * plain / rope["factor"] + kept * plain))
    factor = rope.get("factor") or positions / original
    scale = rope.get("attention_factor")
    if name == "longrope":
        if scale is None:
            scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return Rope(_floats(plain / np.asarray(rope["short_factor"], np.float64)), float(scale), int(original))
    return Rope(_floats(_yarn(rope, plain, factor, original, outer.get("truncate", True))), _yarn_scale(rope, factor))


def _yarn(rope: Mapping[str, Any], plain: np.ndarray, factor: float, original: int, truncate: bool) -> np.ndarray:
    """Keeps frequencies with many turns within the original length and divides those with few turns by `factor`."""
    turning, base = 2 * len(plain), rope["rope_theta"]
    place = lambda turns: turning * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = place(rope.get("beta_fast") or 32), place(rope.get("beta_slow") or 1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turning - 1)
    slowed = np.clip((np.arange(len(plain)) - low) / ((high - low) or 0.001), 0, 1)
    return slowed * plain / factor + (1 - slowed) * plain


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    size = lambda scale: 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return float(size(mscale) / size(mscale_all)) if mscale and mscale_all else float(size(1.0))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def rotation(rope: Rope, positions: Array) -> tuple[Array, Array]:
    """cos and sin of the angles, (B, T, 1, rotated size of a head) float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies, jnp.float32)
    angles = jnp.concatenate([angles, angles], -1)[..., None, :]
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(x: Array, turned: tuple[Array, Array], interleaved: bool) -> Array:
    """Rotates the first part of each head; the size of `turned` says how much."""
    cos, sin = (t.astype(x.dtype) for t in turned)
    turning = cos.shape[-1]
    part, rest = x[..., :turning], x[..., turning:]
    if interleaved:
        cos, sin = (jnp.repeat(t[..., : turning // 2], 2, -1) for t in (cos, sin))
        across = jnp.stack([-part[..., 1::2], part[..., 0::2]], -1).reshape(part.shape)
    else:
        first, second = jnp.split(part, 2, -1)
        across = jnp.concatenate([-second, first], -1)
    rotated = part * cos + across * sin
    return jnp.concatenate([rotated, rest], -1) if rest.shape[-1] else rotated
