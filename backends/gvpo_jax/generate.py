"""Sampling: one prefill per prompt, whose cache its k responses share, then decoding until all responses have ended.

This file has the host's part; `decoding` has the programs. A response does not depend on the batch in which it was
drawn, up to float rounding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from gvpo_core.training.policy import Response, Tokens
from gvpo_core.training.policy.prefixes import Prefixes, part_of
from gvpo_core.training.sampling import Sampling, uniforms
from gvpo_jax import mesh as meshes
from gvpo_jax import ranks
from gvpo_jax.decoding import decode, decode_and_keep, extend, prefill
from gvpo_jax.model import Parameters, Setup
from gvpo_jax.prefixes import filled_caches, keep
from gvpo_jax.programs import Programs
from gvpo_jax.rows import SMALLEST, bucket, rows_bucket

_ADVICE = "lower rollout.responses or rollout.max_tokens, or raise model.mesh_fsdp"
PADDED = 32  # padding of a prompt is at most 1/32 of the room for its responses, or what `bucket` adds
_FILTERS = ("top_k", "min_p", "top_p")
Unit = tuple[int, list[int]]  # index of a prompt, and indices of its seeds


def generate(
    setup: Setup,
    programs: Programs,
    parameters: Parameters,
    adapters: Parameters,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end: Sequence[int],
    cache_tokens: int,
    prefixes: Prefixes | None = None,
) -> tuple[list[list[Response]], list[list[float]]]:
    """Returns len(seeds[i]) responses to prompts[i], and the sampler's log-prob of each at temperature 1.

    Args:
      end: ids that end a response.
      cache_tokens: cache capacity of this process's devices in tokens; sets how many rows are decoded together.
      prefixes: kept keys and values from which prompts start; responses are added. One process only.
    """
    responses: list[list[Any]] = [[None] * len(row) for row in seeds]
    logprobs = [[0.0] * len(row) for row in seeds]
    room = bucket(sampling.max_tokens)
    shards = meshes.batch_shards(setup.mesh)
    chunks = chunks_of(prompts, seeds, room, cache_tokens, shards)
    if prefixes is not None:  # prompts with and without kept states need different programs
        prefixes.plan(prompts, seeds)
        has_prefix = [bool(prefixes.start(prompt).length) for prompt in prompts]
        chunks = [part for chunk in chunks for part in _parted(chunk, has_prefix)]
    for number in range(ranks.most(len(chunks))[0]):
        units = chunks[number] if number < len(chunks) else []
        shape = ranks.most(*shape_of(units, prompts, room, shards))
        arguments = (setup, programs, parameters, adapters, prompts, seeds, units, shape, sampling, end)
        texts, scores = _decode(*arguments, prefixes)
        for (i, places), text, score in zip(units, texts, scores, strict=True):
            for j, response, value in zip(places, text, score, strict=True):
                responses[i][j], logprobs[i][j] = response, value
    return responses, logprobs


def chunks_of(
    prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], room: int, cache_tokens: int, shards: int
) -> list[list[Unit]]:
    """Groups units to decode together: within the padded budget, with similar prompt lengths and response counts."""
    units: list[Unit] = []
    for i in range(len(prompts)):
        most = rows_bucket(len(seeds[i]), 1)
        while most > 1 and prompt_width(len(prompts[i]), most, room) + most * room > cache_tokens // shards:
            most //= 2
        units += [(i, list(range(j, min(j + most, len(seeds[i]))))) for j in range(0, len(seeds[i]), most)]
    units.sort(key=lambda unit: (len(unit[1]), len(prompts[unit[0]])), reverse=True)
    chunks: list[list[Unit]] = []
    for unit in units:
        if chunks:
            alike = len(unit[1]) * 2 > len(chunks[-1][0][1])  # sorted: the first has the most responses
            rows, k, width = shape_of([*chunks[-1], unit], prompts, room, shards)
        if not chunks or not alike or rows * (width + k * room) > cache_tokens:
            chunks.append([])
        chunks[-1].append(unit)
    return chunks


def shape_of(units: Sequence[Unit], prompts: Sequence[Tokens], room: int, shards: int) -> tuple[int, int, int]:
    """Returns the padded shape of units that are decoded together: prompts, responses per prompt, tokens per prompt."""
    k = rows_bucket(max((len(places) for _, places in units), default=1), 1)
    longest = max((len(prompts[i]) for i, _ in units), default=1)
    return rows_bucket(len(units), shards), k, prompt_width(longest, k, room)


def prompt_width(longest: int, responses: int, room: int) -> int:
    """Returns the padded prompt length. Its steps are small compared with the room for responses, so shapes are few."""
    step = max(SMALLEST, 1 << (responses * room // PADDED).bit_length() - 1)
    return -(-bucket(longest) // step) * step


def _parted(chunk: list[Unit], has_prefix: Sequence[bool]) -> list[list[Unit]]:
    parts = [[unit for unit in chunk if has_prefix[unit[0]] is kind] for kind in (True, False)]
    return [part for part in parts if part]


def _decode(
    setup: Setup,
    programs: Programs,
    parameters: Parameters,
    adapters: Parameters,
    prompts: Sequence[Tokens],
    seeds: Sequence[Sequence[int]],
    units: Sequence[Unit],
    shape: tuple[int, ...],
    sampling: Sampling,
    end: Sequence[int],
    prefixes: Prefixes | None,
) -> tuple[list[list[Response]], list[list[float]]]:
    groups, k, width = shape
    ids, lengths = np.zeros((groups, width), np.int32), np.ones(groups, np.int32)
    wanted = np.zeros((groups, k), bool)
    numbers = np.zeros((groups, k, bucket(sampling.max_tokens)), np.float32)
    for g, (i, places) in enumerate(units):
        ids[g, : len(prompts[i])] = prompts[i]
        lengths[g] = len(prompts[i])
        wanted[g, : len(places)] = True
        drawn = uniforms([seeds[i][j] for j in places], 0, sampling.max_tokens)
        numbers[g, : len(places), : sampling.max_tokens] = np.minimum(drawn, 1 - 2.0**-24)
    filters = tuple(name for name in _FILTERS if getattr(sampling, name) != getattr(Sampling(1), name))
    settings = {
        "temperature": sampling.temperature or 1.0,
        "limit": sampling.max_tokens,
        "top_k": min(sampling.top_k, setup.spec.vocabulary),
        "min_p": sampling.min_p,
        "top_p": sampling.top_p,
    }
    put = lambda values: meshes.put(values, setup.mesh)
    everywhere = {
        name: meshes.put(np.asarray(value, np.int32 if name in ("limit", "top_k") else np.float32), setup.mesh, None)
        for name, value in settings.items()
    }
    call = lambda function, static, *arrays: programs.call(function, static, *arrays, advice=_ADVICE)
    if begun := _begun([prompts[i] for i, _ in units], prefixes, groups, width):
        kept, filled, fresh = begun
        kept_arrays = (jax.tree.map(partial(meshes.put, mesh=setup.mesh, axis=1), kept), put(filled), put(fresh))
        start = call(extend, (setup,), parameters, adapters, *kept_arrays, put(lengths))
    else:
        start = call(prefill, (setup,), parameters, adapters, put(ids), put(lengths))
    static = (setup, sampling.temperature == 0, filters, tuple(end))
    rest = (*start, put(lengths), put(wanted), put(numbers), everywhere)
    result = call(decode if prefixes is None else decode_and_keep, static, parameters, adapters, *rest)
    tokens, sums = (meshes.local(array) for array in result[:2])
    texts, scores = [], []
    for g, (_, places) in enumerate(units):
        texts.append([_response(tokens[g, j, : sampling.max_tokens], end) for j in range(len(places))])
        scores.append([float(sums[g, j]) for j in range(len(places))])
    if prefixes is not None:
        prefixes.started([prompts[i] for i, places in units for _ in places])
        keep(prefixes, [prompts[i] for i, _ in units], texts, start[0], result[2])
    return texts, scores


def _begun(
    prompts: Sequence[Tokens], prefixes: Prefixes | None, groups: int, width: int
) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """Returns the arguments of `extend` if the prompts start from kept states, else None. A chunk never mixes both."""
    if prefixes is None or not prompts:
        return None
    part = part_of(list(prompts), prefixes)
    if part.states[0] is None:
        return None
    caches, of_prompt = filled_caches(part, groups, width)
    filled, fresh = np.zeros(groups, np.int32), np.zeros((groups, bucket(part.fresh)), np.int32)
    for g, (prompt, count) in enumerate(zip(part.prompts, of_prompt, strict=True)):
        filled[g] = count
        fresh[g, : len(prompt) - count] = prompt[count:]
    return caches, filled, fresh


def _response(tokens: np.ndarray, end: Sequence[int]) -> Response:
    at = np.flatnonzero(np.isin(tokens, end))
    return Response(tuple(tokens[: at[0] + 1].tolist() if len(at) else tokens.tolist()), bool(len(at)))
