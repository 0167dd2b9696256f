"""Checks at load: scoring, packing, checkpointing and decoding compute what the model itself computes."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Batch, layout
from gvpo_core.training.policy.prefixes import Prefixes
from gvpo_core.training.policy.step import refuse_not_finite
from gvpo_core.training.sampling import Sampling
from gvpo_torch import blocks, decode_attention, rope
from gvpo_torch.cache import new_cache
from gvpo_torch.generate import generate
from gvpo_torch.model import Scorer, checkpointing, enable_checkpointing, score
from gvpo_torch.prefixes import unfit
from gvpo_torch.sharding import gathered, gathered_no_more, is_sharded, no_gradients

log = logging.getLogger("gvpo.torch")

FAST = ("cuda",)  # types of devices on which blocks and fixed buffers are tried; they are slower elsewhere
_FAILS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check(
    scorer: Scorer, config: ModelConfig, device: torch.device, agree: Callable[[bool], bool] = bool
) -> tuple[bool, str]:
    """Calls `check_whole`, in float32 if parameters are float32; for a sharded model in the dtype of its products.

    Shards are gathered in that dtype. Every rank must call it, and runs the same checks.

    Args:
      agree: whether the verdict of every rank is true; what one rank rejects, no rank uses.
    """
    with scorer.autocast() if is_sharded(scorer) else contextlib.nullcontext():
        packed, reason = check_whole(scorer, config, device)
    gathered_no_more(scorer)
    if not agree(packed) and packed:
        packed, reason = False, "packed log-probs differ at load in another process"
    if not agree(scorer.in_blocks) and scorer.in_blocks:
        _take_dense_mask(scorer, "another process takes it")
    scorer.decodes_fixed = agree(scorer.decodes_fixed)
    scorer.in_graphs = scorer.decodes_fixed and device.type == "cuda"
    return packed, reason


def check_whole(scorer: Scorer, config: ModelConfig, device: torch.device) -> tuple[bool, str]:
    """Compares log-probs with the model's own, packed rows with plain ones, sampling with scoring; chooses the layout.

    Sets `scorer.same_length` if prompts of different lengths cannot be decoded together.

    Returns: whether rows are packed, and why.
    Raises: ConfigError: log-probs or samples disagree, the model cannot be run, or the layout is not exact.
    """
    name = type(scorer.base).__name__
    batch = layout.check_batch(scorer.base.get_output_embeddings().weight.shape[0])
    with no_gradients(scorer):  # as scoring does: a compiled program is made for one kind of tensor
        with _explained(f"{name} cannot be scored{' with model.compile = true' if scorer.compiled else ''}"):
            plain = _by_response(scorer, batch, False, device)
            direct = _own_logprobs(scorer, batch, device)
        refuse_not_finite(direct, name)
        difference = _differ(scorer, direct, plain)
        if difference is not None:  # tokens may see the padding after them
            scorer.masks_padding = True
            plain = _by_response(scorer, batch, False, device)
            difference = _differ(scorer, direct, plain)
        if difference is not None:
            raise ConfigError(
                f"log-probs of {name} differ from its own forward pass by up to {difference:.3g} nat a token: "
                "it changes its logits in an unknown way, so it cannot be trained exactly"
            )
        _check_decoding(scorer, name, batch, plain, device)
        if device.type in FAST:
            scorer.decodes_fixed = decodes_fixed(scorer, batch, plain, device)
    if config.gradient_checkpointing:
        _check_checkpointing(scorer, name, batch, plain, device)

    def packed_difference() -> float | None:
        with no_gradients(scorer):
            apart = _differ(scorer, _by_response(scorer, batch, True, device), plain)
        if apart is None and device.type in FAST:
            in_blocks(scorer, device)
        return apart

    return layout.choose(scorer.config.to_dict(), config.layout, name, packed_difference, log)


@contextlib.contextmanager
def _explained(failure: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except _FAILS as error:
        lines = str(error).strip().splitlines() or ["no message"]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise ConfigError(f"{failure}: {type(error).__name__}: {reason}") from error


def _own_logprobs(scorer: Scorer, batch: Batch, device: torch.device) -> list[np.ndarray]:
    """Returns log-probs of each response's tokens by the model's own forward pass, one row at a time."""
    direct = []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        if scorer.rope is not None:
            rope.reset(scorer.decoder)
        ids = torch.tensor([prompt + response], device=device)
        logits = scorer.own_logits(ids)[0, len(prompt) - 1 : -1].float()
        chosen = torch.tensor(response, device=device).unsqueeze(1)
        direct.append(logits.log_softmax(-1).gather(1, chosen).squeeze(1).cpu().numpy())
    return direct


def _check_checkpointing(
    scorer: Scorer, name: str, batch: Batch, plain: list[np.ndarray], device: torch.device
) -> None:
    with checkpointing(scorer), _explained(f"{name} cannot be trained with gradient checkpointing"):
        trained = _by_response(scorer, batch, False, device)
    difference = _differ(scorer, trained, plain)
    if difference is not None:
        raise ConfigError(
            f"log-probs of {name} with gradient checkpointing differ by up to {difference:.3g} nat a token from those "
            "without: set model.gradient_checkpointing = false"
        )


def defers(scorer: Scorer, device: torch.device) -> bool:
    """Whether all micro-batches of a group may run forward before the first runs backward, with recomputed layers.

    If recomputed layers give other log-probs than scoring, or if RoPE depends on the row, a group is scored first.
    """
    name, reason = type(scorer.base).__name__, "RoPE depends on the length of the row"
    if scorer.rope is None:
        batch = layout.check_batch(scorer.base.get_output_embeddings().weight.shape[0])
        try:
            enable_checkpointing(scorer.base)
            with scorer.autocast() if is_sharded(scorer) else contextlib.nullcontext():
                with no_gradients(scorer):
                    plain = _by_response(scorer, batch, False, device)
                with checkpointing(scorer) as layers:
                    apart = _differ(scorer, _by_response(scorer, batch, False, device), plain)
            gathered_no_more(scorer)
            reason = "" if apart is None else f"log-probs with checkpointing differ by up to {apart:.3g} nat at load"
            reason = reason if layers else "its layers cannot be computed again"
        except _FAILS as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if reason:
        log.info("%s: a group of several micro-batches is scored before its gradient is taken (%s)", name, reason)
    return not reason


def in_blocks(scorer: Scorer, device: torch.device) -> bool:
    """Lets packed rows attend by blocks from now on, if log-probs and gradients match those of the dense mask.

    Compares only log-probs if FlexAttention has no gradient. Compares the gradients of the first trained parameters,
    which come before all attention. Gathers all parameters of a sharded model once. Returns: whether they match.
    """
    if not blocks.fits(scorer.base):
        return _take_dense_mask(scorer, "its attention cannot be replaced")
    draw = np.random.default_rng(1)
    vocabulary = scorer.base.get_output_embeddings().weight.shape[0]
    prompt, beginning, *others = (tuple(draw.integers(0, vocabulary, n).tolist()) for n in (150, 60, 140, 10, 140))
    # Three responses, two with a common beginning, after a prompt of more than one block of 128 tokens.
    batch = Batch([prompt] * 3, [others[0], beginning + others[1], beginning + others[2]], [0] * 3)
    arrays = layout.arrays(batch, layout.plan_rows(batch, packed=True, tokens=1 << 30))
    reason = ""

    def computed() -> tuple[list[np.ndarray], Sequence[Tensor]]:
        trained = [p for p in scorer.parameters() if p.requires_grad][:2]  # two: LoRA's first matrix has gradient 0
        graded = bool(trained) and device.type not in blocks.WITHOUT_GRADIENT
        with torch.set_grad_enabled(graded):
            values = score(scorer, arrays, device)
        gradients = torch.autograd.grad(values.sum(), trained) if graded else ()
        return arrays.split(values.detach().cpu().numpy()), gradients

    with gathered(scorer):
        try:
            dense, dense_gradients = computed()
            scorer.in_blocks = True
            scorer.base.set_attn_implementation(blocks.ATTENTION)
            logprobs, gradients = computed()
            if (apart := _differ(scorer, logprobs, dense)) is not None:
                reason = f"by blocks log-probs differ by up to {apart:.3g} nat"
            error = math.hypot(*(float((g - w).norm()) for g, w in zip(gradients, dense_gradients, strict=True)))
            size = math.hypot(*(float(w.norm()) for w in dense_gradients))
            if not error <= min(20 * _tolerance(scorer)[1], 0.2) * size:
                reason = f"by blocks gradients differ by {error:.2g}, and have norm {size:.2g}"
        except Exception as error:  # compilers' errors too: any is a reason to keep the dense mask
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return _take_dense_mask(scorer, reason) if reason else True


def _take_dense_mask(scorer: Scorer, reason: str) -> bool:
    """Gives packed rows a dense mask instead of blocks. Returns: False."""
    if scorer.in_blocks:
        scorer.in_blocks = False
        scorer.base.set_attn_implementation("sdpa")
    log.info("%s: packed rows take a dense mask (%s)", type(scorer.base).__name__, reason)
    return False


def _check_decoding(scorer: Scorer, name: str, batch: Batch, plain: list[np.ndarray], device: torch.device) -> None:
    """Compares decoding with a cache to scoring, with prompts padded to one length if that works.

    A response's last token is drawn but not computed. So an end token may replace it, one that no response has earlier.
    """
    if scorer.rope is not None and max(map(len, batch.prompts)) + max(map(len, batch.responses)) > scorer.rope.original:
        log.info("%s: decoding is not checked, as RoPE of length %d depends on the row", name, scorer.rope.original)
        return
    differences: list[float] = []
    for same_length in (False, True):
        if scorer.same_length and not same_length:
            continue
        scorer.same_length = same_length
        with _explained(f"{name} cannot be sampled with a cache") if same_length else contextlib.nullcontext():
            try:
                decoded = _decoded(scorer, batch, device)
            except _FAILS:
                if same_length:
                    raise
                continue
        difference = _differ(scorer, decoded, plain)
        if difference is None:
            return
        differences.append(difference)
    raise ConfigError(
        f"{name} decodes with a cache differently from scoring: log-probs differ by up to {differences[-1]:.3g} nat a "
        "token. It cannot be sampled exactly"
    )


def decodes_fixed(scorer: Scorer, batch: Batch, plain: list[np.ndarray], device: torch.device) -> bool:
    """Whether decoding in fixed buffers agrees with scoring. If not, the other loop samples, and the log says so.

    Models that do not attend to all earlier tokens use that loop by design, without a line in the log.
    """
    if not decode_attention.fits(scorer):
        return False
    try:
        with gathered(scorer):
            apart = _differ(scorer, _decoded(scorer, batch, device, in_fixed_buffers=True), plain)
    except _FAILS as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        if apart is None:
            return True
        reason = f"log-probs then differ by up to {apart:.3g} nat"
    name = type(scorer.base).__name__
    log.warning("%s: sampling waits for the device at each token; buffers of fixed size do not work (%s)", name, reason)
    return False


@torch.no_grad()
def continues(scorer: Scorer, device: torch.device) -> str:
    """Returns why turns cannot start from kept keys and values; empty: log-probs then agree with scoring."""
    batch = layout.check_batch(scorer.base.get_output_embeddings().weight.shape[0])
    rows = [i for i, response in enumerate(batch.responses) if len(response) > 2]
    batch, prefixes = batch.take(rows), Prefixes(1 << 30)
    first = [response[: len(response) // 2 + 1] for response in batch.responses]
    prompts = [p + begun for p, begun in zip(batch.prompts, first, strict=True)]
    second = [response[len(begun) :] for response, begun in zip(batch.responses, first, strict=True)]
    try:
        with scorer.autocast() if is_sharded(scorer) else contextlib.nullcontext():
            cache = new_cache(scorer.decoder, scorer.config)
            ids = torch.tensor([batch.prompts[0]], device=device)
            scorer(ids, torch.arange(ids.shape[1], device=device)[None], cache=cache)
            if reason := unfit(scorer, cache):
                return reason
            fixed_too = scorer.decodes_fixed
            earlier, later = Batch(batch.prompts, first, batch.groups), Batch(prompts, second, range(len(rows)))
            _decoded(scorer, earlier, device, in_fixed_buffers=fixed_too, prefixes=prefixes)
            decoded = _decoded(scorer, later, device, in_fixed_buffers=fixed_too, prefixes=prefixes)
            apart = _differ(scorer, decoded, _by_response(scorer, later, False, device))
    except _FAILS as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if apart is not None:
        return f"log-probs then differ by up to {apart:.3g} nat"
    return "" if prefixes.reused else "nothing of a cache was kept"


def _decoded(
    scorer: Scorer,
    batch: Batch,
    device: torch.device,
    *,
    in_fixed_buffers: bool = False,
    prefixes: Prefixes | None = None,
) -> list[np.ndarray]:
    """Returns log-probs of each response's tokens as the sampler computes them when it is given these tokens."""
    prompts = sorted(set(batch.prompts), key=len)
    members = [[i for i, prompt in enumerate(batch.prompts) if prompt == of_prompt] for of_prompt in prompts]
    end = next(token for token in range(10**9) if not any(token in response[:-1] for response in batch.responses))
    logprobs_of: list[list[float]] = [[] for _ in batch.responses]

    def choose(logits: Tensor, rows: Sequence[tuple[int, int]], t: int) -> np.ndarray:
        logprobs = logits.float().log_softmax(-1).cpu().numpy()
        chosen = []
        for line, (prompt, number) in enumerate(rows):
            i = members[prompt][number]
            response = batch.responses[i]
            if t < len(response):  # else the row has ended, and is only decoded along with the others
                logprobs_of[i].append(logprobs[line, response[t]])
            chosen.append(response[t] if t < len(response) - 1 else end)
        return np.asarray(chosen, dtype=np.int64)

    generate(
        scorer,
        scorer,
        prompts,
        [[0] * len(of_prompt) for of_prompt in members],
        Sampling(max_tokens=max(map(len, batch.responses))),
        end=[end],
        device=device,
        cache_tokens=1 << 30,
        choose=choose,
        in_fixed_buffers=in_fixed_buffers,
        prefixes=prefixes,
    )
    return [np.asarray(values) for values in logprobs_of]


def _differ(scorer: Scorer, values: list[np.ndarray], plain: list[np.ndarray]) -> float | None:
    """Returns the largest difference per token, nat, if it is more than rounding; else None."""
    return layout.largest_difference(values, plain, _tolerance(scorer))


def _tolerance(scorer: Scorer) -> tuple[float, float]:
    # Largest and mean difference per token, nat. Full fine-tuning without shards is checked in float32, as autocast is
    # off. In 16 bits a router may send a token to another expert. The head is always compared in float32: see head.py.
    if scorer.base.get_output_embeddings().weight.dtype == torch.float32 and not _in_16_bits(scorer):
        strict = torch.get_float32_matmul_precision() == "highest"
        return (2e-3, 5e-4) if strict else (0.1, 0.02)
    return 1.0, 0.1


def _in_16_bits(scorer: Scorer) -> bool:
    return is_sharded(scorer) and scorer.dtype != torch.float32


def _by_response(scorer: Scorer, batch: Batch, packed: bool, device: torch.device) -> list[np.ndarray]:
    splitting = layout.Splitting(packed, 1 << 30, 0, 0, scorer.rope)
    by_response: dict[int, np.ndarray] = {}
    for rows in splitting.rows(batch):
        arrays = layout.arrays(batch, rows)
        values = score(scorer, arrays, device).detach().cpu().numpy()
        by_response |= dict(zip(sorted(arrays.responses.tolist()), arrays.split(values), strict=True))
    return [by_response[i] for i in range(len(batch))]
