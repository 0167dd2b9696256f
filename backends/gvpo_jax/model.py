"""The decoder that a `Spec` describes, as functions of its parameters.

Parameters are a flat mapping from transformers' names to arrays. If all layers have the same shapes, their parameters
are stacked under a name with `*` instead of the layer's number, and `lax.scan` runs them: only one layer is compiled.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gvpo_jax import blocks
from gvpo_jax.experts import mixture
from gvpo_jax.logprobs import CHUNK_BYTES, DEVICE_CHUNK_BYTES, capped, product, token_logprobs
from gvpo_jax.mesh import BATCH, fitting, tensor_axes
from gvpo_jax.rope import rotate, rotation
from gvpo_jax.spec import EMBEDDING, HEAD, LAYER, LAYERS, NORM, Layer, Spec

Parameters = Mapping[str, Array]
Turned = tuple[Array, Array]  # cos and sin of RoPE's angles
Caches = Sequence[tuple[Array, Array] | None]  # keys and values of each stack; None if it reads another's
ATTENTION_BYTES = 128 * 2**20  # of scores computed at once


@dataclass(frozen=True)
class Setup:
    """What a program is compiled for, besides the shapes of its arguments."""

    spec: Spec
    mesh: Mesh
    dtype: str  # of products
    remat: bool = False
    scale: float = 0.0  # of adapters; 0: none
    in_blocks: bool = False  # attention uses `blocks` for rows that fit; `check` decides

    @property
    def compute(self) -> Any:
        """The dtype of products."""
        return jnp.dtype(self.dtype)


@dataclass(frozen=True)
class Stack:
    """Layers that one `lax.scan` runs: all layers if they have the same shapes, else one layer."""

    layer: Layer  # settings without arrays; window and rope are those of the first layer
    members: range
    arrays: dict[str, Array]  # with a leading axis over the members


@dataclass(frozen=True)
class Tables:
    """Inputs of the layers besides their parameters, for the current tokens."""

    turned: tuple[Turned, ...]  # index: Layer.rope
    inputs: Array | None  # (B, T, layers, size): Gemma 4's own embedding of each token in each layer

    def scanned(self, spec: Spec, members: range) -> dict[str, Any]:
        """Returns the arrays of a stack that `lax.scan` cuts into layers."""
        layers = [spec.each[i] for i in members]
        facts: dict[str, Any] = {"window": jnp.asarray([layer.window for layer in layers], jnp.int32)}
        if len(members) > 1 and len(self.turned) > 1:
            facts["turned"] = tuple(jnp.stack([self.turned[layer.rope][i] for layer in layers]) for i in range(2))
        if self.inputs is not None:
            facts["inputs"] = jnp.moveaxis(self.inputs[:, :, members.start : members.stop], 2, 0)
        return facts

    def of(self, layer: Layer, scanned: Mapping[str, Any]) -> Turned:
        """Cosine and sine of the layer's RoPE. If layers differ, they come from the scanned layer."""
        turned: Turned = scanned.get("turned") or self.turned[layer.rope]
        return turned


def score(setup: Setup, parameters: Parameters, adapters: Parameters, rows: Mapping[str, Array]) -> Array:
    """(B, P) float32 log-probabilities of the tokens that each row predicts.

    Args:
      rows: ids, positions, segments, last (B, T), predict, targets (B, P), int32; see `rows.Rows`.
    """
    states = hidden_states(setup, parameters, adapters, *(rows[n] for n in ("ids", "positions", "segments", "last")))
    chosen = jnp.take_along_axis(states, rows["predict"][..., None], axis=1)
    head = _head_weight(setup, parameters)
    a_device = CHUNK_BYTES.get(setup.mesh.devices.flat[0].platform, DEVICE_CHUNK_BYTES)
    chunk = a_device * setup.mesh.size  # logits are sharded over the whole mesh
    return token_logprobs(
        chosen,
        head,
        rows["targets"],
        chunk_bytes=chunk,
        frozen=bool(adapters),
        scale=setup.spec.logit_scale,
        softcap=setup.spec.logit_cap,
        mesh=setup.mesh,
    )


def _head_weight(setup: Setup, parameters: Parameters) -> Array:
    return parameters[EMBEDDING if setup.spec.tied else HEAD].astype(setup.compute)


def logits(setup: Setup, parameters: Parameters, states: Array) -> Array:
    """(..., V) float32 logits of states after the last norm."""
    products = product("...h,vh->...v", states, _head_weight(setup, parameters), wide=jnp.float32)
    return capped(products * setup.spec.logit_scale, setup.spec.logit_cap)


def after_last(setup: Setup, parameters: Parameters, x: Array, lengths: Array) -> Array:
    """(B, V) float32 logits after token `lengths` (B,) of each row; x: (B, T, H) before the last norm."""
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return logits(setup, parameters, norm(setup, last, parameters[NORM]))


def hidden_states(
    setup: Setup,
    parameters: Parameters,
    adapters: Parameters,
    ids: Array,
    positions: Array,
    segments: Array,
    last: Array,
) -> Array:
    """(B, T, H) after the last norm, in the compute dtype; see `attention`."""
    x, _ = through_layers(setup, parameters, adapters, ids, positions, segments, last, keep=False)
    return norm(setup, x, parameters[NORM])


def through_layers(
    setup: Setup,
    parameters: Parameters,
    adapters: Parameters,
    ids: Array,
    positions: Array,
    segments: Array,
    last: Array,
    *,
    keep: bool,
) -> tuple[Array, list[tuple[Array, Array] | None]]:
    """(B, T, H) before the last norm, and keys and values of each stack: (members, B, T, key heads, width) each.

    Args:
      keep: whether to return all keys and values. False: only those that other layers read.
    """
    spec = setup.spec
    read_layers = {layer.source for layer in spec.each}
    x = embed(setup, parameters, ids)
    tables = tables_of(setup, parameters, adapters, ids, x, positions)
    caches: list[tuple[Array, Array] | None] = []
    for stack in stacks(spec, parameters, adapters):
        source = stack.layer.source
        shared = None if source is None else caches[source]
        kept_here = source is None and (keep or stack.members.start in read_layers)

        def layer(
            x: Array, inputs: Any, stack: Stack = stack, shared: Any = shared, kept_here: bool = kept_here
        ) -> tuple[Array, Any]:
            weights, scanned = inputs

            def attend(q: Array, k: Array | None, v: Array | None) -> Array:
                keys, values = cast("tuple[Array, Array]", (k, v)) if shared is None else (shared[0][0], shared[1][0])
                return attention(setup, q, keys, values, positions, segments, last, scanned["window"])

            x, k, v = block(
                setup, stack.layer, weights, x, tables.of(stack.layer, scanned), attend, scanned.get("inputs")
            )
            return x, (over_heads(setup, k), over_heads(setup, v)) if kept_here else None

        body = jax.checkpoint(layer) if setup.remat else layer
        x, cache = lax.scan(body, x, (stack.arrays, tables.scanned(spec, stack.members)))
        caches.append(cache)
    return x, caches


def stacks(spec: Spec, parameters: Parameters, adapters: Parameters) -> list[Stack]:
    """Returns the layers as stacks that `lax.scan` runs one after another."""
    named = {**parameters, **adapters}
    if spec.uniform:
        arrays = {name.removeprefix(LAYER): a for name, a in named.items() if name.startswith(LAYER)}
        return [Stack(spec.each[0], range(spec.layers), arrays)]
    result = []
    for i, layer in enumerate(spec.each):
        start = f"{LAYERS}{i}."
        weights = {name.removeprefix(start): a[None] for name, a in named.items() if name.startswith(start)}
        result.append(Stack(layer, range(i, i + 1), weights))
    return result


def embed(setup: Setup, parameters: Parameters, ids: Array) -> Array:
    """(B, T, H) embeddings of token ids (B, T), with the model's scale."""
    embedded = parameters[EMBEDDING][ids].astype(setup.compute)
    if setup.spec.embedding_scale != 1.0:
        embedded = embedded * jnp.asarray(setup.spec.embedding_scale, setup.compute)
    return over_batch(setup, embedded)


def tables_of(
    setup: Setup, parameters: Parameters, adapters: Parameters, ids: Array, embedded: Array, positions: Array
) -> Tables:
    """Computes the layers' `Tables` for these tokens."""
    spec = setup.spec
    turned = tuple(rotation(rope, positions) for rope in spec.ropes)
    if not spec.inputs:
        return Tables(turned, None)
    of_token = parameters["model.embed_tokens_per_layer.weight"][ids].astype(setup.compute)
    of_token = of_token * jnp.asarray(spec.inputs**0.5, setup.compute)
    named = {**parameters, **adapters}
    of_context = linear(setup, named, "model.per_layer_model_projection", embedded) * spec.hidden**-0.5
    split = lambda x: x.reshape(*ids.shape, spec.layers, spec.inputs)
    of_context = norm(setup, split(of_context), parameters["model.per_layer_projection_norm.weight"])
    return Tables(turned, (of_context + split(of_token)) * 2.0**-0.5)


def over_batch(setup: Setup, x: Array) -> Array:
    """Shards the first axis over `data` and `fsdp`, so that parameters move to the batch and not the batch to them."""
    spec = PartitionSpec(BATCH, *(None,) * (x.ndim - 1))
    return lax.with_sharding_constraint(x, NamedSharding(setup.mesh, spec))


def over_heads(setup: Setup, x: Array) -> Array:
    """Shards keys or values (B, ..., heads, width) by rows and heads; all other axes stay unsplit."""
    heads = fitting(setup.mesh, tensor_axes(setup.mesh), x.shape[-2])
    spec = PartitionSpec(BATCH, *(None,) * (x.ndim - 3), heads, None)
    return lax.with_sharding_constraint(x, NamedSharding(setup.mesh, spec))


def block(
    setup: Setup,
    kind: Layer,
    layer: Parameters,
    x: Array,
    turned: Turned,
    attend: Callable[..., Array],
    inputs: Array | None = None,
) -> tuple[Array, Any, Any]:
    """One layer on (B, T, H).

    Args:
      attend: (q (B, T, heads, width), k, v (B, T, key heads, width)) -> (B, T, heads, width); k and v are None if
        the layer reads another's.
      inputs: (B, T, size), this layer's own embedding of each token.
    Returns: (B, T, H), and the layer's k and v.
    """
    family = setup.spec.family
    before, after, before_mlp, after_mlp = family.norms
    normed = lambda x, name: norm(setup, x, layer[f"{name}.weight"]) if name else x
    q, k, v = queries_keys_values(setup, kind, layer, normed(x, before))
    q = rotate(q, turned, family.interleaved)
    if k is not None:
        k = rotate(k, turned, family.interleaved)
    mixed = attend(q, k, v)
    attended = linear(setup, layer, "self_attn.o_proj", mixed.reshape(*x.shape[:-1], -1))
    x = _added(setup, x, normed(attended, after))
    h = _feed_forward(setup, kind, layer, normed(x, before_mlp))
    x = _added(setup, x, normed(h, after_mlp))
    if inputs is not None:
        h = _activate(setup, linear(setup, layer, "per_layer_input_gate", x)) * inputs
        x = x + norm(setup, linear(setup, layer, "per_layer_projection", h), layer["post_per_layer_input_norm.weight"])
    if family.layer_scalar:  # constant, not trained
        x = x * lax.stop_gradient(layer["layer_scalar"]).astype(setup.compute)
    return over_batch(setup, x), k, v


def _added(setup: Setup, x: Array, part: Array) -> Array:
    scale = setup.spec.residual_scale
    return x + (part if scale == 1.0 else part * scale)


def queries_keys_values(setup: Setup, kind: Layer, layer: Parameters, h: Array) -> tuple[Array, Any, Any]:
    """q, k, v (B, T, heads, width) before RoPE. k and v are None if the layer reads another's."""
    family = setup.spec.family
    heads = lambda y: y.reshape(*y.shape[:-1], -1, kind.width)
    parts: dict[str, Array]
    if family.fused:
        fused = linear(setup, layer, "self_attn.qkv_proj", h)
        cut = setup.spec.heads * kind.width
        parts = dict(zip("qkv", jnp.split(fused, [cut, cut + kind.key_heads * kind.width], -1), strict=True))
    else:
        projections = "q" if kind.source is not None else "qkv" if kind.values else "qk"
        parts = {name: linear(setup, layer, f"self_attn.{name}_proj", h) for name in projections}
        if kind.source is None and not kind.values:
            parts["v"] = parts["k"]
    if family.qk_norms == "row":
        parts |= {n: norm(setup, parts[n], layer[f"self_attn.{n}_norm.weight"]) for n in "qk"}
    split = {name: heads(y) for name, y in parts.items()}
    if family.qk_norms == "head":
        split |= {n: norm(setup, split[n], layer[f"self_attn.{n}_norm.weight"]) for n in "qk" if n in split}
    if family.value_norm and "v" in split:
        split["v"] = norm(setup, split["v"], None)
    return split["q"], split.get("k"), split.get("v")


def _feed_forward(setup: Setup, kind: Layer, layer: Parameters, h: Array) -> Array:
    spec = setup.spec
    if kind.sparse:
        return mixture(
            layer,
            h,
            count=spec.experts_a_token,
            normalised=spec.experts_normalised,
            activate=lambda x: _activate(setup, x),
            compute=setup.compute,
        )
    if spec.family.fused_mlp:
        gate, up = jnp.split(linear(setup, layer, "mlp.gate_up_proj", h), 2, -1)
    else:
        gate, up = (linear(setup, layer, f"mlp.{name}_proj", h) for name in ("gate", "up"))
    return linear(setup, layer, "mlp.down_proj", _activate(setup, gate) * up)


def _activate(setup: Setup, x: Array) -> Array:
    if setup.spec.activation in ("silu", "swish"):
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=setup.spec.activation != "gelu")


def linear(setup: Setup, layer: Parameters, name: str, x: Array) -> Array:
    """x @ weight.T + bias, plus the adapter's product if there is one."""
    y = product("...i,oi->...o", x, layer[f"{name}.weight"].astype(setup.compute))
    if f"{name}.bias" in layer:
        y = (_wide(y) + _wide(layer[f"{name}.bias"].astype(y.dtype))).astype(y.dtype)
    if f"{name}.lora_A" in layer:
        inner = product("...i,ri->...r", x, layer[f"{name}.lora_A"].astype(setup.compute))
        y = y + product("...r,or->...o", inner, layer[f"{name}.lora_B"].astype(setup.compute)) * setup.scale
    return y


def norm(setup: Setup, x: Array, weight: Array | None) -> Array:
    """RMSNorm over the last axis, in float32. Without a weight it only normalises."""
    family = setup.spec.family
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + setup.spec.eps)
    if weight is None:
        return wide.astype(setup.compute)
    factor = _wide(weight.astype(setup.compute)) + (1.0 if family.offset else 0.0)
    return (factor * (wide if family.wide_norms else _wide(wide.astype(setup.compute)))).astype(setup.compute)


def _wide(x: Array) -> Array:
    """Casts to float32, so that the gradient of a vector is summed over all tokens in float32."""
    return x.astype(jnp.float32)


def attention(
    setup: Setup, q: Array, k: Array, v: Array, positions: Array, segments: Array, last: Array, window: Array
) -> Array:
    """Attention by the kernels of `blocks`, or by blocks of queries; the backward pass recomputes scores. A query sees
    tokens up to its own place, less than `window` positions back, whose `last` segment is at least its own."""
    rows, length = segments.shape
    if setup.in_blocks and blocks.fits(setup.mesh, rows, length):
        spec = setup.spec
        options = {"scale": spec.attention_scale, "cap": spec.attention_cap, "windowed": min(spec.windows) < length}
        return blocks.attend(setup.mesh, q, k, v, positions, segments, last, window, **options)  # type: ignore[arg-type]
    shards = math.prod(setup.mesh.shape[axis] for axis in BATCH)
    a_query = max(1, rows // shards) * q.shape[2] * length * 4
    size = max(16, min(length, ATTENTION_BYTES // a_query))
    while length % size:
        size -= 1
    order = jnp.arange(length)

    @jax.checkpoint
    def one(start: Array) -> Array:
        cut = lambda x: lax.dynamic_slice_in_dim(x, start, size, 1)
        sees, at = cut(segments)[:, :, None] <= last[:, None, :], cut(positions)[:, :, None]
        sees &= order[None, None, :] <= (start + jnp.arange(size))[None, :, None]
        sees &= at - positions[:, None, :] < window
        return weighted(setup.spec, cut(q), [(k, v, sees)])

    if size == length:
        return one(jnp.int32(0))
    parts = lax.map(one, jnp.arange(0, length, size, dtype=jnp.int32))
    return jnp.moveaxis(parts, 0, 1).reshape(q.shape)


def weighted(spec: Spec, q: Array, sources: list[tuple[Array, Array, Array]]) -> Array:
    """Softmax-weighted values, with one softmax over several sources of keys and values.

    Args:
      q: (B, Q, heads, width).
      sources: k, v (B, S, key heads, width) and sees (B, Q, S) bool; every query sees something.
    Returns: (B, Q, heads, width).
    """
    batch, queries, heads, width = q.shape
    scores = []
    for k, _, sees in sources:
        grouped = q.reshape(batch, queries, k.shape[2], -1, width)
        products = product("bqkgd,bskd->bkgqs", grouped, k, wide=jnp.float32) * spec.attention_scale
        scores.append(jnp.where(sees[:, None, None], capped(products, spec.attention_cap), -jnp.inf))
    shares = jax.nn.softmax(jnp.concatenate(scores, -1), -1).astype(q.dtype)
    mixed: Any = None
    start = 0
    for _, v, sees in sources:
        part = shares[..., start : start + sees.shape[-1]]
        start += sees.shape[-1]
        values = product("bkgqs,bskd->bqkgd", part, v)
        mixed = values if mixed is None else mixed + values
    return mixed.reshape(batch, queries, heads, width)
