"""Checks at load: sampling and scoring must agree, and packed rows must score like plain rows."""

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

ROWS, CHECKED = 5, 32  # responses in layout.check_batch; tokens that are enough for any row of these checks
BLOCKS_CHECKED = 768  # tokens of the row for comparing attention by blocks
SAMPLED_TOKENS = 8  # for comparing the sampler with the forward pass


def check_layout(scorer: Scorer, parameters: Parameters, adapters: Parameters, config: ModelConfig) -> tuple[bool, str]:
    """Compares packed rows with plain ones and chooses the layout.

    Returns: whether rows are packed, and the reason.
    Raises: ConfigError: the requested layout is not exact.
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
    """Returns the token log-probs of at most `ROWS` responses. One shape, so one compiled program serves all checks."""
    planned = layout.plan_rows(batch, packed=packed, tokens=CHECKED)
    arrays = layout.arrays(batch, planned)
    shape = (rows_bucket(ROWS, mesh.batch_shards(scorer.mesh)), CHECKED, CHECKED)
    rows = lay(arrays, planned, [(i, 0) for i in range(len(planned))], shape)
    return arrays.split(scorer.values(rows, parameters, adapters)[rows.places])


def _tolerance(dtype: str) -> tuple[float, float]:
    """Returns the tolerated difference of token log-probs in nats: the largest, and the mean."""
    return (2e-3, 5e-4) if dtype == "float32" else (float("inf"), 0.1)


def in_blocks(scorer: Scorer, parameters: Parameters, adapters: Parameters) -> bool:
    """Whether log-probs and gradient with the kernels of `blocks` agree with those without; logs why not."""
    spec, over, programs = scorer.setup.spec, scorer.mesh, Programs()
    draw = np.random.default_rng(1)

    def drawn(n: int) -> Tokens:
        return tuple(draw.integers(0, spec.vocabulary, n).tolist())

    prompts, lengths = (drawn(150), drawn(20)), ((140, 70, 200), (60, 5))  # one row with several blocks
    responses = [drawn(n) for response_lengths in lengths for n in response_lengths]
    responses[1] = responses[2][:40] + responses[1][40:]
    batch = Batch(
        [prompt for prompt, response_lengths in zip(prompts, lengths, strict=True) for _ in response_lengths],
        responses,
        [group for group, response_lengths in enumerate(lengths) for _ in response_lengths],
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
        (plain, gradient), (by_blocks, gradient_by_blocks) = computed(False), computed(True)
        difference = layout.largest_difference(by_blocks, plain, _tolerance(scorer.setup.dtype))
        error = float(programs.call(update.distance, (), gradient, gradient_by_blocks, out=mesh.replicated(over)))
        if difference is not None:
            reason = f"with the kernel log-probs differ by up to {difference:.3g} nat"
        elif not error < (0.01 if scorer.setup.dtype == "float32" else 0.1):
            reason = f"with the kernel a gradient differs by {error:.2g} times its norm"
    except Exception as problem:  # any error, a compiler's too, is a reason not to use the kernels
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
    (failed,) = ranks.most(int(bool(reason)))  # all processes must run the same programs
    if failed:
        reason = reason or "the check failed in another process"
        log.info("%s: attention does not use the kernel (%s)", spec.family.architecture, reason)
    return not failed


def check_decoding(
    scorer: Scorer,
    parameters: Parameters,
    adapters: Parameters,
    *,
    packed: bool,
    dtype: str,
    end: Sequence[int],
) -> None:
    """Compares the sampler's log-probs of a few responses with those of the forward pass.

    Raises: ConfigError: they differ, so the sampler is not the policy that is trained.
    """
    scorer = Scorer(scorer.setup, Programs(), scorer.config)  # the run does not use these shapes
    given = (scorer, parameters, adapters, _prompts(scorer))
    difference, _ = _sampled_differs(*given, packed=packed, dtype=dtype, end=end)
    if difference is not None:
        raise ConfigError(
            f"the sampler of {scorer.setup.spec.family.architecture} differs from its forward pass by up to "
            f"{difference:.3g} nat a token: gvpo_jax cannot sample from this model exactly"
        )


def continues(scorer: Scorer, parameters: Parameters, adapters: Parameters, *, packed: bool, dtype: str) -> str:
    """Returns why turns cannot start from kept keys and values; empty: log-probs then agree with the forward pass."""
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
    """Returns two prompts of different lengths."""
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
    """Returns the difference of sampler and forward pass in nats per token, None if within tolerance; and the samples.

    Each sample is the tokens of a prompt and a drawn response.
    """
    seeds = [[2 * i, 2 * i + 1] for i in range(len(prompts))]
    given = (parameters, adapters, prompts, seeds, Sampling(SAMPLED_TOKENS))
    cache_tokens = lambda: memory.cache_tokens(scorer.sampling)
    responses, sums = scorer.sample(*given, end=end, cache_tokens=cache_tokens, prefixes=prefixes)
    drawn = [(p, r.tokens, i) for i, (p, row) in enumerate(zip(prompts, responses, strict=True)) for r in row]
    batch = Batch(*(list(column) for column in zip(*drawn, strict=True)))
    scored = [values.sum() for values in _scored(scorer, parameters, adapters, batch, packed=packed)]
    differences = ranks.gather(
        np.abs(np.asarray(scored, np.float64) - np.concatenate(sums)) / [len(tokens) for _, tokens, _ in drawn]
    )
    refuse_not_finite([differences], scorer.setup.spec.family.architecture)
    tolerance = (2e-3, 5e-4) if dtype == "float32" else (1.0, 0.1)
    difference = layout.largest_difference([differences], [np.zeros_like(differences)], tolerance)
    return difference, [(*prompt, *tokens) for prompt, tokens, _ in drawn]
