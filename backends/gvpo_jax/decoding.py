"""The sampler's programs: prefill, prefill that starts from kept keys and values, and decoding until all rows ended.

The first arguments of each program are compiled in. A row's t-th token is where the cumulative distribution first
exceeds the t-th number of the row's own stream. Cumulative sums are float32, first within blocks of the vocabulary,
then over the blocks. The probability of a token is exact to about 1e-6.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from gvpo_jax.logprobs import capped, product
from gvpo_jax.mesh import BATCH, fitting, parts, tensor_axes
from gvpo_jax.model import (
    Caches,
    Parameters,
    Setup,
    after_last,
    block,
    embed,
    logits,
    norm,
    over_batch,
    stacks,
    tables_of,
    through_layers,
    weighted,
)
from gvpo_jax.spec import NORM, Spec

BLOCK = 256  # tokens of the vocabulary summed at once
FEWEST, LOOPS = 128, 4  # the part of the cache that is read grows by at least 128 tokens, in at most 4 steps


def prefill(
    setup: Setup, parameters: Parameters, adapters: Parameters, ids: Array, lengths: Array
) -> tuple[Caches, Array]:
    """Computes the prompts' caches and the logits after them.

    Args:
      ids: (G, S) int32, right-padded; lengths: (G,).
    Returns: keys and values of each stack of layers, (members, G, S, key heads, width), or None if it reads another
      stack's; logits (G, V) float32 after each prompt's last token.
    """
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    one_segment = jnp.zeros_like(positions)
    x, kept = through_layers(setup, parameters, adapters, ids, positions, one_segment, one_segment, keep=True)
    return kept, after_last(setup, parameters, x, lengths)


def extend(
    setup: Setup, parameters: Parameters, adapters: Parameters, kept: Caches, filled: Array, ids: Array, lengths: Array
) -> tuple[Caches, Array]:
    """Like `prefill`, for prompts whose first tokens already have keys and values.

    Args:
      kept: keys and values (members, G, S, key heads, width) of each stack, of the first `filled` (G,) tokens.
      ids: (G, F) int32, the tokens that follow, right-padded; lengths: (G,) of the whole prompts, at most S.
    """
    groups, fresh = ids.shape
    positions = filled[:, None] + jnp.arange(fresh, dtype=jnp.int32)
    rows, at = jnp.arange(groups)[:, None], positions[:, :, None]
    x = embed(setup, parameters, ids)
    tables = tables_of(setup, parameters, adapters, ids, x, positions)
    caches = list(kept)
    for number, stack in enumerate(stacks(setup.spec, parameters, adapters)):
        kind = stack.layer
        source = number if kind.source is None else kind.source

        def layer(x: Array, inputs: Any, kind: Any = kind) -> tuple[Array, Any]:
            weights, keys, values, facts = inputs
            pair = [keys, values]

            def attend(q: Array, k: Array | None, v: Array | None) -> Array:
                for n, new in enumerate((k, v) if kind.source is None else ()):
                    assert new is not None
                    pair[n] = pair[n].at[rows, positions].set(new.astype(pair[n].dtype), mode="drop")
                order = jnp.arange(pair[0].shape[1])
                sees = (order <= at) & (at - order < facts["window"])
                return weighted(setup.spec, q, [(pair[0], pair[1], sees)])

            x, _, _ = block(setup, kind, weights, x, tables.of(kind, facts), attend, facts.get("inputs"))
            return x, tuple(pair)

        source_cache = caches[source]
        assert source_cache is not None
        x, cache = lax.scan(layer, x, (stack.arrays, *source_cache, tables.scanned(setup.spec, stack.members)))
        if kind.source is None:
            caches[number] = cache
    return caches, after_last(setup, parameters, x, lengths - filled)


def decode(*arguments: Any) -> tuple[Array, Array]:
    """Like `decode_and_keep`, without returning the caches."""
    return decode_and_keep(*arguments)[:2]


def decode_and_keep(
    setup: Setup,
    greedy: bool,
    filters: tuple[str, ...],
    end: tuple[int, ...],
    parameters: Parameters,
    adapters: Parameters,
    prompt: Caches,
    after: Array,
    lengths: Array,
    wanted: Array,
    numbers: Array,
    settings: Mapping[str, Array],
) -> tuple[Array, Array, Caches]:
    """Draws tokens until every wanted row has ended or `settings["limit"]` is reached.

    Args:
      prompt, after: keys, values and logits of `prefill`, G prompts.
      lengths: (G,) of the prompts; wanted: (G, K) bool, False = padding; numbers: (G, K, R) float32 in [0, 1).
    Returns: tokens (G, K, R) int32, (G, K) float32 sums of their log-probs at temperature 1, and keys and values
      (members, G, K, R, key heads, width) of each stack, for all tokens but the last.
    """
    spec = setup.spec
    groups, k, room = numbers.shape
    layers = stacks(spec, parameters, adapters)
    empty = [_empty_cache(setup, kept, groups, k, room) for kept in prompt]
    ends = jnp.asarray(end, jnp.int32)

    def forward(size: int, tokens: Array, t: Array, caches: Caches) -> tuple[Array, Caches]:
        """Processes token t < size of every row's response and writes its keys and values into the caches."""
        positions = lengths[:, None] + t
        x = embed(setup, parameters, tokens)
        tables = tables_of(setup, parameters, adapters, tokens, x, positions)
        caches = list(caches)

        def over(q: Array, prompt_keys: Array, prompt_values: Array, own_filled: list[Array], window: Array) -> Array:
            # One query per row. It sees the prompt, which the rows of a group share, and the row's own tokens so far.
            order, own_order = jnp.arange(prompt_keys.shape[1]), jnp.arange(size)
            past = (order < lengths[:, None]) & (positions - order < window)
            since = (own_order <= t) & (t - own_order < window)
            return _attend(spec, q, prompt_keys, prompt_values, past, own_filled[0], own_filled[1], since)

        for number, stack in enumerate(layers):
            kind = stack.layer
            scanned = tables.scanned(spec, stack.members)
            at = number if kind.source is None else kind.source

            def layer(carry: Any, inputs: Any, kind: Any = kind) -> tuple[Any, None]:
                x, own_keys, own_values = carry
                place, weights, prompt_keys, prompt_values, facts = inputs
                own_cache = [own_keys, own_values]

                def attend(q: Array, k_new: Array | None, v_new: Array | None) -> Array:
                    if kind.source is None:
                        for n, new in enumerate((k_new, v_new)):
                            start = (place, 0, 0, t, 0, 0)
                            new = new[None, :, :, None].astype(own_cache[n].dtype)  # type: ignore[index]
                            own_cache[n] = lax.dynamic_update_slice(own_cache[n], new, start)
                    filled = (1, groups, k, size)  # no row has tokens past `size` yet
                    own_filled = [lax.dynamic_slice(c, (place, *(0,) * 5), filled + c.shape[4:])[0] for c in own_cache]
                    return over(q, prompt_keys, prompt_values, own_filled, facts["window"])

                x, _, _ = block(setup, kind, weights, x, tables.of(kind, facts), attend, facts.get("inputs"))
                return (x, *own_cache), None

            members = jnp.arange(len(stack.members))
            inputs = (members, stack.arrays, *prompt[at], scanned)  # type: ignore[misc]
            (x, *new_cache), _ = lax.scan(layer, (x, *caches[at]), inputs)  # type: ignore[misc]
            caches[at] = (new_cache[0], new_cache[1])
        return _logits(setup, parameters, x.reshape(groups * k, -1)), caches

    def draw(z: Array, t: Array, ended: Array, drawn: Array, sums: Array) -> tuple[Array, Array, Array, Array]:
        number = lax.dynamic_index_in_dim(numbers, t, 2, keepdims=False)
        z = _over_rows(setup, z)  # each device then has the whole vocabulary for a part of the rows
        flat = pick(z, number.reshape(-1), settings, greedy, filters)
        value = jnp.take_along_axis(z, flat[:, None], -1)[:, 0] - jax.nn.logsumexp(z, -1)
        picked, value = (over_batch(setup, x.reshape(groups, k)) for x in (flat, value))
        sums = sums + jnp.where(ended, 0.0, value)
        drawn = lax.dynamic_update_index_in_dim(drawn, picked, t, 2)
        return picked, ended | jnp.any(picked[..., None] == ends, -1), drawn, sums

    def going(size: int, carry: Any) -> Array:
        t, (_, ended, _, _), _ = carry
        return (t + 1 < settings["limit"]) & (t < size) & ~jnp.all(ended)

    def one(size: int, carry: Any) -> Any:
        t, (picked, ended, drawn, sums), caches = carry
        z, caches = forward(size, picked, t, caches)
        return t + 1, draw(z, t + 1, ended, drawn, sums), caches

    first = jnp.broadcast_to(after[:, None], (groups, k, after.shape[-1])).reshape(groups * k, -1)
    start = draw(first, jnp.int32(0), ~wanted, jnp.zeros(numbers.shape, jnp.int32), jnp.zeros((groups, k)))
    state: Any = (jnp.int32(0), start, empty)
    for size in filled_sizes(room):
        state = lax.while_loop(partial(going, size), partial(one, size), state)
    _, (_, _, drawn, sums), caches = state
    return over_batch(setup, drawn), over_batch(setup, sums), caches


def filled_sizes(room: int) -> list[int]:
    """How many tokens of a cache of `room` tokens each decoding loop reads. A loop ends when that many are filled."""
    step = max(FEWEST, -(-room // LOOPS))
    return [*range(step, room, step), room]


def _empty_cache(
    setup: Setup, kept: tuple[Array, Array] | None, groups: int, k: int, room: int
) -> tuple[Array, Array] | None:
    """Returns an empty cache for the responses' keys and values of a stack, shaped like the prompts' cache."""
    if kept is None:
        return None
    members, _, _, heads, width = kept[0].shape
    empty = jnp.zeros((members, groups, k, room, heads, width), kept[0].dtype)
    split = fitting(setup.mesh, tensor_axes(setup.mesh), heads)
    spec = PartitionSpec(None, BATCH, None, None, split, None)
    empty = lax.with_sharding_constraint(empty, NamedSharding(setup.mesh, spec))
    return empty, empty


def _attend(
    spec: Spec,
    q: Array,
    prompt_keys: Array,
    prompt_values: Array,
    past: Array,
    keys: Array,
    values: Array,
    since: Array,
) -> Array:
    """Attention of q (G, K, heads, width) over the prompt's keys (G, S, ...) and the rows' own (G, K, R, ...)."""
    groups, k, heads, width = q.shape
    grouped = q.reshape(groups, k, keys.shape[-2], -1, width)
    scored = lambda products: capped(products * spec.attention_scale, spec.attention_cap)
    at_prompt = scored(product("gkhqd,gshd->gkhqs", grouped, prompt_keys, wide=jnp.float32))
    at_own = scored(product("gkhqd,gkrhd->gkhqr", grouped, keys, wide=jnp.float32))
    at_prompt = jnp.where(past[:, None, None, None], at_prompt, -jnp.inf)
    at_own = jnp.where(since, at_own, -jnp.inf)
    shares = jax.nn.softmax(jnp.concatenate([at_prompt, at_own], -1), -1).astype(q.dtype)
    cut = prompt_keys.shape[1]
    mixed = product("gkhqs,gshd->gkhqd", shares[..., :cut], prompt_values)
    mixed = mixed + product("gkhqr,gkrhd->gkhqd", shares[..., cut:], values)
    return mixed.reshape(groups, k, heads, width)


def _over_rows(setup: Setup, z: Array) -> Array:
    """Reshards (rows, V) logits from vocabulary to rows: each device computes the logits of its part of the head.

    Rows are split over all devices if their number allows it, else over the batch axes only.
    """
    mesh, tensor = setup.mesh, tensor_axes(setup.mesh)
    every = (*BATCH, *tensor)
    rows = every if z.shape[0] % parts(mesh, every) == 0 else BATCH
    for spec in (PartitionSpec(BATCH, fitting(mesh, tensor, z.shape[1])), PartitionSpec(rows, None)):
        z = lax.with_sharding_constraint(z, NamedSharding(mesh, spec))
    return z


def _logits(setup: Setup, parameters: Parameters, x: Array) -> Array:
    return logits(setup, parameters, norm(setup, x, parameters[NORM]))


def pick(z: Array, numbers: Array, settings: Mapping[str, Array], greedy: bool, filters: tuple[str, ...]) -> Array:
    """(R,) int32: one token per row, by the inverse of the cumulative distribution in vocabulary order.

    Args:
      z: (R, V) float32 logits; numbers: (R,) float32 in [0, 1).
      settings: temperature and the values that `filters` need, as scalars.
    """
    if greedy:
        return jnp.argmax(z, -1).astype(jnp.int32)
    z = z.astype(jnp.float32)
    masses = truncate(jnp.exp((z - z.max(-1, keepdims=True)) / settings["temperature"]), settings, filters)
    rows, size = masses.shape
    blocks = jnp.pad(masses, [(0, 0), (0, -size % BLOCK)]).reshape(rows, -1, BLOCK)
    within = jnp.cumsum(blocks, -1)
    over = jnp.cumsum(within[..., -1], -1)
    wanted = numbers * over[:, -1]
    # Rounding can make u * total equal to the total. Then take the last block with mass, and its last token with mass.
    block_ = jnp.minimum(jnp.sum(over <= wanted[:, None], -1), jnp.argmax(over, -1))
    before = jnp.where(block_ > 0, jnp.take_along_axis(over, jnp.maximum(block_ - 1, 0)[:, None], 1)[:, 0], 0.0)
    inner = jnp.take_along_axis(within, block_[:, None, None], 1)[:, 0]
    at = jnp.minimum(jnp.sum(inner <= (wanted - before)[:, None], -1), jnp.argmax(inner, -1))
    return (block_ * BLOCK + at).astype(jnp.int32)


def truncate(masses: Array, settings: Mapping[str, Array], filters: tuple[str, ...]) -> Array:
    """Zeroes the (R, V) masses that top-k, min-p and top-p cut, in this order. Ties at the border stay."""
    if "top_k" in filters:
        ordered = -jnp.sort(-masses, -1)
        last = jnp.clip(settings["top_k"] - 1, 0, masses.shape[1] - 1)
        masses = jnp.where(masses < lax.dynamic_slice_in_dim(ordered, last, 1, 1), 0.0, masses)
    if "min_p" in filters:
        masses = jnp.where(masses < settings["min_p"] * masses.max(-1, keepdims=True), 0.0, masses)
    if "top_p" in filters:
        ordered = -jnp.sort(-masses, -1)
        before = jnp.cumsum(ordered, -1) - ordered
        kept = before < settings["top_p"] * ordered.sum(-1, keepdims=True)
        border = jnp.take_along_axis(ordered, kept.sum(-1, keepdims=True) - 1, 1)
        masses = jnp.where(masses < border, 0.0, masses)
    return masses
