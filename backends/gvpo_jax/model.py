"""A compact decoder read from config.json: Llama, Mistral, Qwen2 and Qwen3, with every setting honoured or refused.

Parameters are a flat mapping from transformers' names to arrays; the layers' arrays are stacked, with `*` in the place
of the layer's number, and run through `lax.scan`: one layer is compiled, however many there are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.hugging_face import rope_settings
from gvpo_core.training.policy.weight_files import refuse_quantization
from gvpo_jax.logprobs import CHUNK_BYTES, DEVICE_CHUNK_BYTES, product, token_logprobs
from gvpo_jax.mesh import BATCH

Parameters = Mapping[str, Array]
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "max_window_layers",
)
"""What `read_spec` reads, RoPE and the layers' kinds apart."""
ROPE_TYPES = ("default", "linear", "llama3")
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.*."
NO_WINDOW = 2**30
ATTENTION_BYTES = 128 * 2**20  # of scores computed at once


@dataclass(frozen=True)
class Spec:
    """A model's shape and settings; hashable, so that programs are compiled for it once."""

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    width: int  # of a head
    eps: float
    tied: bool
    attention_bias: tuple[str, ...]  # of q, k, v, o
    mlp_bias: bool
    windows: tuple[int, ...]  # tokens that each layer sees back; NO_WINDOW: all
    frequencies: tuple[float, ...]  # RoPE, radians a position, width / 2 of them

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape, layers stacked."""
        h, queries, keys, m = self.hidden, self.heads * self.width, self.key_heads * self.width, self.intermediate
        layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
        for which, shape in {"q": (queries, h), "k": (keys, h), "v": (keys, h), "o": (h, queries)}.items():
            layer[f"self_attn.{which}_proj.weight"] = shape
            if which in self.attention_bias:
                layer[f"self_attn.{which}_proj.bias"] = shape[:1]
        if self.family == "qwen3":
            layer |= {f"self_attn.{which}_norm.weight": (self.width,) for which in "qk"}
        for which, shape in {"gate": (m, h), "up": (m, h), "down": (h, m)}.items():
            layer[f"mlp.{which}_proj.weight"] = shape
            if self.mlp_bias:
                layer[f"mlp.{which}_proj.bias"] = shape[:1]
        top = {EMBEDDING: (self.vocabulary, h), NORM: (h,)} | ({} if self.tied else {HEAD: (self.vocabulary, h)})
        return top | {LAYER + name: (self.layers, *shape) for name, shape in layer.items()}


@dataclass(frozen=True)
class Setup:
    """What a program is compiled for beside the shapes of its arguments."""

    spec: Spec
    mesh: Mesh
    dtype: str  # of products
    remat: bool = False
    scale: float = 0.0  # of adapters; 0: none

    @property
    def compute(self) -> Any:
        return jnp.dtype(self.dtype)


def read_spec(config: Mapping[str, Any]) -> Spec:
    """The model that config.json describes, completed as `hugging_face.read_config` does.

    Raises: ConfigError: an architecture, RoPE type, activation or quantisation that is not known here, by name.
    """
    family = config.get("model_type")
    named = (config.get("architectures") or [FAMILIES.get(str(family))])[0]
    if family not in FAMILIES or named != FAMILIES[family]:
        raise ConfigError(
            f"gvpo_jax does not know the architecture {named} (model_type {family}); it knows "
            f"{', '.join(FAMILIES.values())}. gvpo_torch takes any model of transformers"
        )
    refuse_quantization(config, "gvpo_jax")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act of {named} is {activation!r}; gvpo_jax knows silu")
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    if family == "qwen2":
        bias: tuple[str, ...] = ("q", "k", "v")
    else:
        bias = ("q", "k", "v", "o") if config.get("attention_bias") else ()
    return Spec(
        family=family,
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        width=width,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
        windows=_windows(config),
        frequencies=tuple(float(f) for f in _frequencies(rope_settings(config), width)),
    )


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if config["model_type"] == "llama" or window is None:
        return (NO_WINDOW,) * layers
    if config["model_type"] == "mistral":
        return (int(window),) * layers
    if not config.get("use_sliding_window", False):
        return (NO_WINDOW,) * layers
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= config.get("max_window_layers", 28) else "full_attention" for i in range(layers)
    ]
    return tuple(int(window) if kind == "sliding_attention" else NO_WINDOW for kind in kinds)


def _frequencies(rope: Mapping[str, Any], width: int) -> np.ndarray:
    """(width / 2,) float64, radians a position."""
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        raise ConfigError(f"gvpo_jax does not know rope_type {kind!r}; it knows {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; gvpo_jax turns whole heads only")
    plain = rope["rope_theta"] ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / rope["factor"]
    # llama3: long waves are slowed down by `factor`, short ones kept, those between blended.
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - share) * plain / rope["factor"] + share * plain


def score(setup: Setup, parameters: Parameters, adapters: Parameters, rows: Mapping[str, Array]) -> Array:
    """(B, P) float32 log-probability of each row's predicted tokens.

    Args:
      rows: ids, positions, segments (B, T), predict, targets (B, P), int32; see `update.Rows`.
    """
    states = hidden_states(setup, parameters, adapters, rows["ids"], rows["positions"], rows["segments"])
    chosen = jnp.take_along_axis(states, rows["predict"][..., None], axis=1)
    head = head_weight(setup, parameters)
    a_device = CHUNK_BYTES.get(setup.mesh.devices.flat[0].platform, DEVICE_CHUNK_BYTES)
    chunk = a_device * setup.mesh.size  # logits are sharded over the whole mesh
    return token_logprobs(chosen, head, rows["targets"], chunk_bytes=chunk, frozen=bool(adapters))


def head_weight(setup: Setup, parameters: Parameters) -> Array:
    return parameters[EMBEDDING if setup.spec.tied else HEAD].astype(setup.compute)


def hidden_states(
    setup: Setup, parameters: Parameters, adapters: Parameters, ids: Array, positions: Array, segments: Array
) -> Array:
    """(B, T, H) after the last norm, in the compute dtype. A token sees its own segment and the prompt (segment 0)."""
    turned = rotation(setup.spec, positions)

    def layer(x: Array, inputs: tuple[Parameters, Array]) -> tuple[Array, tuple[Array, Array]]:
        own, window = inputs

        def attend(q: Array, k: Array, v: Array) -> Array:
            return attention(setup, q, k, v, positions, segments, window)

        return block(setup, own, x, turned, attend)[0], None

    body = jax.checkpoint(layer) if setup.remat else layer
    x = embed(setup, parameters, ids)
    x, _ = lax.scan(body, x, (stacked(parameters, adapters), jnp.asarray(setup.spec.windows, jnp.int32)))
    return norm(setup, x, parameters[NORM])


def stacked(parameters: Parameters, adapters: Parameters) -> dict[str, Array]:
    """What `lax.scan` cuts into layers."""
    return {name.removeprefix(LAYER): a for name, a in {**parameters, **adapters}.items() if name.startswith(LAYER)}


def embed(setup: Setup, parameters: Parameters, ids: Array) -> Array:
    return over_batch(setup, parameters[EMBEDDING][ids].astype(setup.compute))


def over_batch(setup: Setup, x: Array) -> Array:
    """Sharded along its first axis over `data` and `fsdp`, so that parameters move to the batch and not it to them."""
    spec = PartitionSpec(BATCH, *(None,) * (x.ndim - 1))
    return lax.with_sharding_constraint(x, NamedSharding(setup.mesh, spec))


def block(setup: Setup, layer: Parameters, x: Array, turned: tuple[Array, Array], attend: Any) -> Any:
    """One layer on (B, T, H).

    Args:
      attend: (q (B, T, heads, width), k, v (B, T, key heads, width)) -> (B, T, heads, width).
    Returns: (B, T, H), and the layer's k and v.
    """
    spec = setup.spec
    h = norm(setup, x, layer["input_layernorm.weight"])
    q, k, v = (linear(setup, layer, f"self_attn.{name}_proj", h) for name in "qkv")
    q, k, v = (y.reshape(*y.shape[:-1], -1, spec.width) for y in (q, k, v))
    if spec.family == "qwen3":
        q, k = norm(setup, q, layer["self_attn.q_norm.weight"]), norm(setup, k, layer["self_attn.k_norm.weight"])
    q, k = rotate(q, turned), rotate(k, turned)
    mixed = attend(q, k, v)
    x = x + linear(setup, layer, "self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))
    h = norm(setup, x, layer["post_attention_layernorm.weight"])
    h = jax.nn.silu(linear(setup, layer, "mlp.gate_proj", h)) * linear(setup, layer, "mlp.up_proj", h)
    return over_batch(setup, x + linear(setup, layer, "mlp.down_proj", h)), k, v


def linear(setup: Setup, layer: Parameters, name: str, x: Array) -> Array:
    """x @ weight.T + bias, with the adapter's part."""
    y = product("...i,oi->...o", x, layer[f"{name}.weight"].astype(setup.compute))
    if f"{name}.bias" in layer:
        y = (_wide(y) + _wide(layer[f"{name}.bias"].astype(y.dtype))).astype(y.dtype)
    if f"{name}.lora_A" in layer:
        inner = product("...i,ri->...r", x, layer[f"{name}.lora_A"].astype(setup.compute))
        y = y + product("...r,or->...o", inner, layer[f"{name}.lora_B"].astype(setup.compute)) * setup.scale
    return y


def norm(setup: Setup, x: Array, weight: Array) -> Array:
    """RMSNorm over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + setup.spec.eps)
    return (_wide(weight.astype(setup.compute)) * _wide(wide.astype(setup.compute))).astype(setup.compute)


def _wide(x: Array) -> Array:
    """float32: the gradient of a vector that meets every token is summed over them in the dtype they meet in."""
    return x.astype(jnp.float32)


def rotation(spec: Spec, positions: Array) -> tuple[Array, Array]:
    """cos and sin of RoPE's angles, (B, T, 1, width) float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(spec.frequencies, jnp.float32)
    angles = jnp.concatenate([angles, angles], -1)[..., None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, turned: tuple[Array, Array]) -> Array:
    cos, sin = (t.astype(x.dtype) for t in turned)
    first, second = jnp.split(x, 2, -1)
    return x * cos + jnp.concatenate([-second, first], -1) * sin


def attention(setup: Setup, q: Array, k: Array, v: Array, positions: Array, segments: Array, window: Array) -> Array:
    """Attention in blocks of queries whose scores are computed again in the backward pass, never kept."""
    rows, length = segments.shape
    shards = math.prod(setup.mesh.shape[axis] for axis in BATCH)
    a_query = max(1, rows // shards) * q.shape[2] * length * 4
    size = max(16, min(length, ATTENTION_BYTES // a_query))
    while length % size:
        size -= 1
    order = jnp.arange(length)

    @jax.checkpoint
    def one(start: Array) -> Array:
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, 1)
        mine, at = cut(segments)[:, :, None], cut(positions)[:, :, None]
        sees = (mine == segments[:, None, :]) | (segments[:, None, :] == 0)
        sees &= order[None, None, :] <= (start + jnp.arange(size))[None, :, None]
        sees &= at - positions[:, None, :] < window
        return weighted(cut(q), [(k, v, sees)])

    if size == length:
        return one(jnp.int32(0))
    parts = lax.map(one, jnp.arange(0, length, size, dtype=jnp.int32))
    return jnp.moveaxis(parts, 0, 1).reshape(q.shape)


def weighted(q: Array, sources: list[tuple[Array, Array, Array]]) -> Array:
    """Softmax-weighted values over several sources of keys, whose softmax is one.

    Args:
      q: (B, Q, heads, width).
      sources: k, v (B, S, key heads, width) and sees (B, Q, S) bool; every query sees something.
    Returns: (B, Q, heads, width).
    """
    batch, queries, heads, width = q.shape
    scores = []
    for k, _, sees in sources:
        grouped = q.reshape(batch, queries, k.shape[2], -1, width)
        found = product("bqkgd,bskd->bkgqs", grouped, k, wide=jnp.float32) * width**-0.5
        scores.append(jnp.where(sees[:, None, None], found, -jnp.inf))
    shares = jax.nn.softmax(jnp.concatenate(scores, -1), -1).astype(q.dtype)
    mixed, start = None, 0
    for _, v, sees in sources:
        part = shares[..., start : start + sees.shape[-1]]
        start += sees.shape[-1]
        found = product("bkgqs,bskd->bqkgd", part, v)
        mixed = found if mixed is None else mixed + found
    return mixed.reshape(batch, queries, heads, width)
