"""Tiny PyTorch policies: what the tests need of the backend; see `trainer_backends.Backend.policies`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batches
import numpy as np
from places import DEVICE

from gvpo_core.training.policy import Batch, Response
from gvpo_core.training.sampling import Sampling


def policy(folder: Path, *, updates: int = 10, reference: bool = False, seed: int = 0, **settings: Any) -> Any:
    """`gvpo_torch.load`, with settings of either config section."""
    from gvpo_torch import load

    settings = {"deterministic": DEVICE == "cuda"} | settings
    loaded = load(*batches.sections(folder, DEVICE, settings), updates=updates, reference=reference, seed=seed)
    assert str(loaded.device).startswith(DEVICE)
    return loaded


def parameters(of: Any) -> dict[str, np.ndarray]:
    """The trained parameters, float64."""
    return {name: p.detach().cpu().double().numpy().copy() for name, p in of._named.items()}


def dtypes(of: Any) -> set[str]:
    """Of the trained parameters."""
    return {str(p.dtype).removeprefix("torch.") for p in of._named.values()}


def held_bytes(of: Any) -> int:
    """Of parameters and moments."""
    scorer, optimizer = of.scorer, of._optimizer
    held = [*scorer.parameters(), *(v for s in (optimizer.state.values() if optimizer else ()) for v in s.values())]
    return sum(tensor.nbytes for tensor in held)


def first_moments(of: Any) -> dict[str, np.ndarray]:
    """AdamW's, float64; none before the first step."""
    state = of._optimizer.state
    return {name: state[p]["exp_avg"].cpu().double().numpy() for name, p in of._named.items() if p in state}


def fill(of: Any, name: str, value: float) -> None:
    """Sets all numbers of a parameter."""
    of._named[name].data.fill_(value)


@contextlib.contextmanager
def spoiled_gradient(of: Any, name: str) -> Iterator[None]:
    """The gradient of this parameter is NaN."""
    hook = of._named[name].register_hook(lambda g: g * float("nan"))
    try:
        yield
    finally:
        hook.remove()


def global_settings() -> tuple[Any, ...]:
    """What loading and stepping must leave as it was."""
    import torch

    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.initial_seed(),
        torch.random.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


def logits(of: Any, ids: tuple[int, ...]) -> np.ndarray:
    """(T, V) float64 by transformers' own forward pass, without a cache."""
    import torch

    given = torch.tensor([ids], device=of.device)
    with torch.no_grad():
        return of.scorer.base(input_ids=given, attention_mask=torch.ones_like(given)).logits[0].cpu().double().numpy()


def sample(
    of: Any, prompts: list[Any], seeds: list[list[int]], sampling: Sampling, patch: Any
) -> tuple[list[list[Response]], np.ndarray]:
    """Responses, and the log-prob of each at temperature 1 as the sampler saw it, by the loop of any device."""
    from gvpo_torch import generate

    fixed, of.scorer.decodes_fixed = of.scorer.decodes_fixed, False
    try:
        return batches.sample_watched(of, generate, prompts, seeds, sampling, patch)
    finally:
        of.scorer.decodes_fixed = fixed


def drawn(
    of: Any, prompts: Any, seeds: Any, sampling: Sampling, *, in_fixed_buffers: bool, end: Any = None, **options: Any
) -> list[list[Response]]:
    """Responses by the loop that is named; `options`: of `gvpo_torch.generate.generate`."""
    import torch
    from gvpo_torch import generate

    of.scorer.eval()
    options = {"cache_tokens": 1 << 20, "end": of._end if end is None else end, "device": of.device} | options
    with torch.inference_mode(), of.scorer.autocast():
        return generate.generate(
            of.scorer, of.scorer, prompts, seeds, sampling, in_fixed_buffers=in_fixed_buffers, **options
        )


def pick(values: np.ndarray, numbers: np.ndarray, sampling: Sampling) -> list[int]:
    """The sampler's choice from (R, V) logits."""
    import torch
    from gvpo_torch import generate

    return generate.pick(torch.from_numpy(values.astype(np.float32)).to(DEVICE), numbers, sampling).tolist()


def truncate(masses: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What the sampler leaves of (R, V) masses."""
    import torch
    from gvpo_torch import generate

    return generate.truncate(torch.from_numpy(masses.copy()).to(DEVICE), sampling).cpu().numpy()


def reference_gradients(folder: Path, of: Batch, factors: np.ndarray, *, afresh: bool = False) -> dict[str, np.ndarray]:
    """Gradients of -sum factors_i log pi_i by transformers alone, one row at a time, in float64, over own tokens;
    every row of the embedding counts.

    Args:
      afresh: a fresh model for each row: some keep what depends on the rows before.
    """
    import torch
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
        for module in lm.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None
        return lm

    lm, total = load(), {}
    masks = of.masks or [None] * len(of)
    for prompt, response, mask, factor in zip(of.prompts, of.responses, masks, factors, strict=True):
        lm = load() if afresh else lm
        lm.zero_grad()
        logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = logits.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        own = torch.ones(len(response)) if mask is None else torch.tensor(mask, dtype=torch.float64)
        (-factor * (chosen * own).sum()).backward()
        for name, p in lm.named_parameters():
            if p.grad is not None:  # an expert that no token reaches has none
                total[name] = total.get(name, 0.0) + p.grad.numpy()
    return total
