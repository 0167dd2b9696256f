"""Adapters of peft: which layers take them."""

import warnings

import torch
from torch import nn

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy.hugging_face import explained

# Their fused kernels use the weight of `out_proj` alone; peft refuses it.
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def with_adapters(lm: nn.Module, config: ModelConfig, seed: int) -> nn.Module:
    """The model with LoRA or DoRA on its linear layers, as `model.lora_*` say.

    Raises: ConfigError: targets that match nothing, the head or the embedding, or a layer that takes no adapter.
    """
    from peft import LoraConfig, get_peft_model

    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    named = [name for name, module in lm.named_modules() if any(module is end for end in ends)]
    for target in config.lora_targets:
        if any(name == target or name.endswith(f".{target}") for name in named):
            raise ConfigError(
                f"model.lora_targets has {target!r}, the head or the embedding of {type(lm).__name__}, which may be "
                "tied and are used without adapters: leave it out"
            )
    targets = "all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    for target in () if targets == "all-linear" else targets:  # peft passes over one of several that match nothing
        if not any(name == target or name.endswith(f".{target}") for name, _ in lm.named_modules()):
            raise ConfigError(
                f"model.lora_targets has {target!r}, which is no layer of {type(lm).__name__}: use all-linear, or "
                "names of its layers such as q_proj"
            )
    unfit = _unfit(lm)
    for target in () if targets == "all-linear" else targets:
        if any(name == target or name.endswith(f".{target}") for name in unfit):
            raise ConfigError(
                f"model.lora_targets has {target!r}, a layer of {type(lm).__name__} that takes no adapter: a router, "
                "or a layer whose weight is used outside of it. Leave it out"
            )
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules=targets,
        exclude_modules=unfit or None,
        lora_dropout=0.0,
        use_dora=config.lora_kind == "dora",
        task_type="CAUSAL_LM",
    )
    with (
        torch.random.fork_rng(),
        explained(f"adapters for {config.lora_targets}", config),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by a name since deprecated
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")  # its own, for experts not adapted
        torch.manual_seed(seed % 2**63)
        return get_peft_model(lm, adapters)


def _unfit(lm: nn.Module) -> list[str]:
    """Linear layers that peft would take for plain ones, or refuses."""
    mamba = getattr(lm.config, "model_type", None) in _MAMBA
    return [
        name
        for name, module in lm.named_modules()
        if isinstance(module, nn.Linear) and (not _is_linear(module) or (mamba and name.endswith(".out_proj")))
    ]


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    """Whether a linear layer computes what its class says: a router of PhiMoE or Llama 4 returns a tuple."""
    if type(layer).forward is nn.Linear.forward:
        return True
    x = torch.linspace(-1, 1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device).unsqueeze(0)
    try:
        found = layer(x)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, nn.functional.linear(x, layer.weight, layer.bias))
