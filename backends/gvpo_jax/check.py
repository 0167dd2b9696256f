"""Checks at load: what the policy samples is what it scores, and packed rows are plain ones."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Batch, Tokens, layout
from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.policy.step import refuse_not_finite
from gvpo_core.training.sampling import Sampling
from gvpo_jax import memory, mesh, ranks, update
from gvpo_jax.model import Parameters
from gvpo_jax.programs import Programs
from gvpo_jax.rows import lay, rows_bucket
from gvpo_jax.scorer import Scorer
from gvpo_jax.spec import EMBEDDING

log = logging.getLogger("gvpo.jax")

ROWS, CHECKED = 5, 32  # responses of layout.check_batch, and tokens that hold a row of them, or of what is sampled
BLOCKS_CHECKED = 768  # tokens of the row that compares attention by blocks
SAMPLED_TOKENS = 8  # to compare the sampler with the forward pass


def check_layout(scorer: Scorer, parameters: Parameters, adapters: Parameters, config: ModelConfig) -> tuple[bool, str]:
    """Compares packed rows with plain ones; chooses the layout.

    Returns: whether rows are packed, and why.
    Raises: ConfigError: a layout that is not exact.
    """
    spec = scorer.setup.spec
    batch = layout.check_batch(spec.vocabulary)

    def packed_difference() -> float | None:
        packed, plain = (_scored(scorer, parameters, adapters, batch, packed=kind) for kind in (True, False))
        return layout.largest_difference(packed, plain, _tolerance(config.dtype))

    return layout.choose(scorer.config, config.layout, spec.family.architecture, packed_difference, log)


def _scored(
    scorer: Scorer, parameters: Parameters, adapters: Parameters, batch: Batch, *, packed: bool
) -> list[np.ndarray]:
    """Token log-probs of each of at most `ROWS` responses, all in one shape: one program is compiled for all checks."""
    planned = layout.plan_rows(batch, packed=packed, tokens=CHECKED)
    arrays = layout.arrays(batch, planned)
    shape = (rows_bucket(ROWS, mesh.batch_shards(scorer.mesh)), CHECKED, CHECKED)
    rows = lay(arrays, planned, [(i, 0) for i in range(len(planned))], shape)
    return arrays.split(scorer.values(rows, parameters, adapters)[rows.places])


def _tolerance(dtype: str) -> tuple[float, float]:
    """Nats that scores of one token may differ by, and of a token on average."""
    return (2e-3, 5e-4) if dtype == "float32" else (float("inf"), 0.1)


def in_blocks(scorer: Scorer, parameters: Parameters, adapters: Parameters) -> bool:
    """Whether log-probs and gradient with the kernels of `blocks` are those without; logs why not."""
    spec, over, programs = scorer.setup.spec, scorer.mesh, Programs()
    draw = np.random.default_rng(1)

    def drawn(n: int) -> Tokens:
        return tuple(draw.integers(0, spec.vocabulary, n).tolist())

    prompts, lengths = (drawn(150), drawn(20)), ((140, 70, 200), (60, 5))  # over several blocks of one row
    responses = [drawn(n) for own in lengths for n in own]
    responses[1] = responses[2][:40] + responses[1][40:]
    batch = Batch(
        [prompt for prompt, own in zip(prompts, lengths, strict=True) for _ in own],
        responses,
        [group for group, own in enumerate(lengths) for _ in own],
    )
    planned = layout.plan_rows(batch, packed=True, tokens=BLOCKS_CHECKED)
    starts = np.cumsum([0, *(row.length for row in planned)]).tolist()
    shape = (mesh.batch_shards(over), BLOCKS_CHECKED, BLOCKS_CHECKED)
    arrays = layout.arrays(batch, planned)
    rows = lay(arrays, planned, [(0, start) for start in starts[:-1]], shape)
    given = (parameters, adapters, mesh.put_all(rows.arrays, over))
    out = (mesh.batch_sharding(over), mesh.parameter_sharding(over, EMBEDDING, parameters[EMBEDDING].shape))

    def computed(blocks: bool) -> tuple[list[np.ndarray], Any]:
        setup = replace(scorer.setup, in_blocks=blocks)
        values, gradient = programs.call(update.score_with_gradient, (setup,), *given, out=out)
        return arrays.split(mesh.local(values)[rows.places]), gradient

    reason = ""
    try:
        (wanted, gradient), (logprobs, other) = computed(False), computed(True)
        apart = layout.largest_difference(logprobs, wanted, _tolerance(scorer.setup.dtype))
        error = float(programs.call(update.distance, (), gradient, other, out=mesh.replicated(over)))
        if apart is not None:
            reason = f"with it log-probs differ by up to {apart:.3g} nat"
        elif not error < (0.01 if scorer.setup.dtype == "float32" else 0.1):
            reason = f"with it a gradient differs by {error:.2g} of itself"
    except Exception as problem:  # of a compiler too: any is a reason to do without
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
    (anywhere,) = ranks.most(int(bool(reason)))  # processes run the same programs
    if anywhere:
        log.info("%s: attention takes no kernel (%s)", spec.family.architecture, reason or "another process says why")
    return not anywhere


def check_decoding(
    scorer: Scorer,
    parameters: Parameters,
    adapters: Parameters,
    *,
    packed: bool,
    dtype: str,
    end: Sequence[int],
) -> None:
    """Compares what the sampler says of a few responses with their log-probs by the forward pass.

    Raises: ConfigError: they differ, so that the sampler is not the policy that is trained.
    """
    scorer = Scorer(scorer.setup, Programs(), scorer.config)  # these shapes are not the run's
    given = (scorer, parameters, adapters, _prompts(scorer))
    difference, _ = _sampled_differs(*given, packed=packed, dtype=dtype, end=end)
    if difference is not None:
        raise ConfigError(
            f"the sampler of {scorer.setup.spec.family.architecture} differs from its forward pass by up to "
            f"{difference:.3g} nat a token: gvpo_jax cannot sample from this model exactly"
        )


def continues(scorer: Scorer, parameters: Parameters, adapters: Parameters, *, packed: bool, dtype: str) -> str:
    """Why turns cannot start from kept keys and values; empty: log-probs are then those of the forward pass."""
    scorer, prefixes = Scorer(scorer.setup, Programs(), scorer.config), Prefixes(1 << 20)
    prompts, others = _prompts(scorer), [(3, 5), (7,)]
    for _ in range(2):
        given = (scorer, parameters, adapters, prompts)
        difference, drawn = _sampled_differs(*given, packed=packed, dtype=dtype, end=(), prefixes=prefixes)
        prompts = [(*tokens, *other) for tokens, other in zip(drawn[::2], others, strict=True)]
    if not prefixes.reused:
        return "none are kept"
    return "" if difference is None else f"log-probs then differ by up to {difference:.3g} nat a token"


def _prompts(scorer: Scorer) -> list[Tokens]:
    """Two prompts, of different lengths."""
    return list(dict.fromkeys(layout.check_batch(scorer.setup.spec.vocabulary).prompts))[:2]


def _sampled_differs(
    scorer: Scorer,
    parameters: Parameters,
    adapters: Parameters,
    prompts: Sequence[Tokens],
    *,
    packed: bool,
    dtype: str,
    end: Sequence[int],
    prefixes: Prefixes | None = None,
) -> tuple[float | None, list[Tokens]]:
    """How far the sampler is from the forward pass, nats a token, if it is too far; and what it drew, with prompts."""
    seeds = [[2 * i, 2 * i + 1] for i in range(len(prompts))]
    given = (parameters, adapters, prompts, seeds, Sampling(SAMPLED_TOKENS))
    cache_tokens = lambda: memory.cache_tokens(scorer.sampling)
    responses, sums = scorer.sample(*given, end=end, cache_tokens=cache_tokens, prefixes=prefixes)
    drawn = [(p, r.tokens, i) for i, (p, row) in enumerate(zip(prompts, responses, strict=True)) for r in row]
    batch = Batch(*(list(column) for column in zip(*drawn, strict=True)))
    scored = [values.sum() for values in _scored(scorer, parameters, adapters, batch, packed=packed)]
    apart = ranks.gather(
        np.abs(np.asarray(scored, np.float64) - np.concatenate(sums)) / [len(tokens) for _, tokens, _ in drawn]
    )
    refuse_not_finite([apart], scorer.setup.spec.family.architecture)
    tolerance = (2e-3, 5e-4) if dtype == "float32" else (1.0, 0.1)
    difference = layout.largest_difference([apart], [np.zeros_like(apart)], tolerance)
    return difference, [(*prompt, *tokens) for prompt, tokens, _ in drawn]
