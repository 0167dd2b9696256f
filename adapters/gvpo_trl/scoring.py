"""Checks that TRL's padded batches score responses as the model scores one sequence alone.

TRL pads prompts on the left and passes no positions, computes log-probabilities with its own head, and scores in
training mode. Each of these can change a response's log-probability, and with it the step.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from gvpo_core.training.policy.layout import RopeByLength, rope_by_length

_SAME = 1e-5  # nats; float32 rounding when experts get other batches
_PROMPTS, _COMPLETIONS = ([5], [17, 3, 11]), ([7, 2, 13], [19, 23])  # different lengths; ids modulo the vocabulary


def rope_of(model: Any) -> RopeByLength | None:
    """Returns the RoPE of a transformers model if it depends on the length of a row, else None."""
    return rope_by_length(model.config.get_text_config().to_dict())


def check_lengths(rope: RopeByLength, attention_mask: Tensor) -> None:
    """Checks that no row's RoPE depends on another row of the batch, or on an earlier batch.

    Args:
      attention_mask: (B, T); T is the padded length, over which TRL's positions count.
    Raises: RuntimeError: a row's RoPE does.
    """
    width, lengths = attention_mask.shape[1], attention_mask.sum(dim=1)
    if width <= rope.original or (rope.kind == "longrope" and bool((lengths > rope.original).all())):
        return
    raise RuntimeError(
        f"rope_type is {rope.kind!r} and a batch is padded to {width} tokens: beyond {rope.original} tokens its"
        " frequencies depend on the longest row, so the others' log-probabilities would not be their own. Remove"
        f" prompts for which prompt and max_completion_length together exceed {rope.original} tokens"
    )


def count_positions_from_the_mask(model: Any) -> None:
    """Makes forward passes without a cache use positions that count only a row's own tokens, as `generate` does.

    Otherwise a model with learned positions shifts the positions of a left-padded prompt. A model that takes no
    positions is not changed.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(type(base).forward).parameters:
        return

    def positions(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if ids is None or mask is None or mask.shape != ids.shape or kwargs.get("position_ids") is not None:
            return None
        return args, kwargs | {"position_ids": (mask.long().cumsum(dim=1) - 1).clamp(min=0)}

    model.register_forward_pre_hook(positions, with_kwargs=True)


def check_scores(trainer: Any) -> None:
    """Scores two short rows padded and in training mode, as TRL does, and each alone, as the model does.

    Raises: ValueError: TRL cannot score the model; the model draws random numbers in training mode; padding changes a
      row's log-probabilities (not checked for experts in 16 bits, since their rounding depends on the batch); or they
      differ from those of the row alone.
    """
    name = name_of(trainer)
    modes = {module: module.training for module in trainer.model.modules()}
    checkpointing = trainer.args.gradient_checkpointing_kwargs
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, checkpointing), trainer.accelerator.autocast():
        try:
            trainer.model.train()
            before = _random_states(trainer.model)
            scores = padded_scores(trainer, trainer.model)
            if not all(torch.equal(a, b) for a, b in zip(before, _random_states(trainer.model), strict=True)):
                raise ValueError(
                    f"{name} draws random numbers in training mode: its weights and gradient would belong to two"
                    " different sub-networks. Load it with router noise, stochastic depth and the like set to 0"
                )
            if not (_rounds(trainer, trainer.model) and _has_experts(trainer.model)):
                _compare_paddings(name, scores, padded_scores(trainer, trainer.model, padding=1))
            trainer.model.eval()
            _compare(name, scores, trainer, trainer.model)
        finally:
            for module, training in modes.items():
                module.training = training
        if trainer.ref_model is not None:
            scores = padded_scores(trainer, trainer.ref_model)
            _compare(f"the reference, {name},", scores, trainer, trainer.ref_model)


def name_of(trainer: Any) -> str:
    """Returns the class name of the trained model, without wrappers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


@contextlib.contextmanager
def scoring_by_trl(trainer: Any) -> Iterator[None]:
    """Wraps TRL's own scoring, which expects the usual layout of a model.

    Raises: ValueError: TRL cannot score the model; the message names it.
    """
    try:
        yield
    except (AttributeError, TypeError, KeyError) as e:
        raise ValueError(
            f"TRL cannot score {name_of(trainer)} ({type(e).__name__}: {e}): GVPOTrainer does not train it;"
            ' `gvpo train` with run.backend = "torch" may'
        ) from e


def _random_states(model: Any) -> list[Tensor]:
    device = next(model.parameters()).device
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _rows(trainer: Any) -> list[tuple[list[int], list[int]]]:
    size = trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().vocab_size
    return [([i % size for i in p], [i % size for i in c]) for p, c in zip(_PROMPTS, _COMPLETIONS, strict=True)]


def padded_scores(trainer: Any, model: Any, padding: int = 0) -> list[Tensor]:
    """Returns the log-probabilities of the rows' completions: first from one padded batch, then from each row alone.

    Args:
      padding: the id at padded positions.
    """
    rows = _rows(trainer)
    device = next(model.parameters()).device
    left, right = (max(len(row[part]) for row in rows) for part in (0, 1))
    ids = torch.full((len(rows), left + right), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        place = slice(left - len(prompt), left + len(completion))
        ids[row, place], mask[row, place] = torch.tensor(prompt + completion), 1
    ids, mask = ids.to(device), mask.to(device)
    score = trainer._get_per_token_logps_and_entropies
    batches = [slice(0, len(rows)), *(slice(row, row + 1) for row in range(len(rows)))]
    scores = torch.cat([score(model, ids[part], mask[part], right)[0] for part in batches])
    lengths = 2 * [len(completion) for _, completion in rows]
    return [values[:length].float() for values, length in zip(scores, lengths, strict=True)]


def _rounds(trainer: Any, model: Any) -> bool:
    """Returns whether scores are rounded to 16 bits or fewer, for example by quantized weights."""
    return bool(trainer.args.bf16 or trainer.args.fp16 or any(p.dtype.itemsize < 4 for p in model.parameters()))


def _has_experts(model: Any) -> bool:
    """Returns whether the model has experts, so that a token's rounding may depend on other tokens of the batch."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    config = model.config.get_text_config()
    return any((getattr(config, name, None) or 0) > 0 for name in names)


def _compare_paddings(name: str, scores: list[Tensor], others: list[Tensor]) -> None:
    """Checks that the id at masked positions does not change the scores.

    This holds in 16 bits too: a masked position has weight 0, and equal numbers round equally.

    Raises: ValueError: the scores differ.
    """
    apart = float((torch.cat(scores) - torch.cat(others)).abs().max())
    if apart > _SAME:
        raise ValueError(
            f"{name} lets padding change the scores of a row, by up to {apart:.2g} nat a token between two padding ids,"
            " as a recurrent layer without a mask does. GVPO cannot be exact with it in TRL"
        )


def differ(trainer: Any, scores: list[Tensor], others: list[Tensor]) -> float | None:
    """Returns the largest difference between two models' scores of the same tokens, nats; None if only rounding."""
    apart = (torch.cat(scores) - torch.cat(others)).abs()
    same = apart.mean() <= 0.1 if _rounds(trainer, trainer.model) else apart.max() <= 2e-3  # 16 bits: compare means
    return None if same else float(apart.max())


def _compare(name: str, padded: list[Tensor], trainer: Any, model: Any) -> None:
    alone = []
    for prompt, completion in _rows(trainer):
        ids = torch.tensor([prompt + completion], device=padded[0].device)
        logits = model(input_ids=ids).logits[0, -len(completion) - 1 : -1].float()  # prompt tuning prepends tokens
        alone.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    apart = differ(trainer, padded, alone + alone)
    if apart is not None:
        raise ValueError(
            f"{name} scores tokens differently in TRL's padded batches, by up to {apart:.2g} nat"
            " each: it does not mask padding, or changes its logits in a way that TRL's head omits. GVPO cannot"
            " be exact with it in TRL"
        )
