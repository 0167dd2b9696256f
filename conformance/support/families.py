"""Every causal-LM family of transformers, made tiny from its own configuration class, and its float64 reference.

`names` lists the families, `make` saves one as a Hugging Face folder, `Reference` scores with transformers alone.
"""

import dataclasses
from pathlib import Path
from typing import Any

import batches
import numpy as np
import tiny_models

from gvpo_core.training.policy import Batch, Tokens

WINDOW = 6  # shorter than the rows
SPREAD = 0.2  # standard deviation of all matrices: the next token depends on the ones before
TEXT: dict[str, Any] = tiny_models.SMALL | {
    "bos_token_id": 1,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "initializer_range": 0.02,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 4,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_mamba_heads": 2,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 4,
    "query_pre_attn_scalar": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": tiny_models.VOCABULARY,
    "num_kv_shared_layers": 0,
    "rotary_dim": 8,
    "kv_channels": 8,
    "ffn_dim": 48,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "sliding_window_size": WINDOW,
    "unpadded_vocab_size": tiny_models.VOCABULARY,
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "lm_head_multiplier": 0.5,
    "logits_mup_width_multiplier": 2.0,
    "final_logit_softcapping": 4.0,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    "use_mamba_kernels": False,
    "use_cache": True,
    "is_decoder": True,
}
OWN = ("sliding_window", "final_logit_softcapping")  # not set where the family has none
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 32,
    "vision_output_dim": 32,
    "projector_input_dim": 16,
    "projector_output_dim": 32,
    "projection_dim": 32,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}


def make(name: str, folder: Path, window: int = WINDOW) -> Path:
    """Saves a family's tiny model and a tokenizer: `folder`."""
    import torch

    config = make_config(name)
    for part in (config, config.get_text_config()):
        if getattr(part, "sliding_window", None) == WINDOW:
            part.sliding_window = window
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:  # norms and biases away from one and zero, so that each one matters
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, SPREAD)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


def model_class(config: Any) -> Any:
    """The auto class with a head for text: of causal models, else of models of images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModelForImageTextToText


def make_config(name: str) -> Any:
    """The configuration of a family's tiny model."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[name]
    return cls(**_settings(cls, name))


def _settings(cls: Any, name: str) -> dict[str, Any]:
    """Small values for those of a configuration's fields that set a size."""
    from family_settings import SETTINGS

    own = SETTINGS.get(name, {})
    found = _of_fields(cls, TEXT)
    if "kv_lora_rank" in found:  # multi-head latent attention has no fewer keys than queries
        found |= _of_fields(cls, {"num_key_value_heads": TEXT["num_attention_heads"]})
    kinds = list(dict.fromkeys(getattr(cls(), "layer_types", None) or ()))
    if len(kinds) > 1 and _of_fields(cls, {"layer_types": kinds}):  # a layer of each kind
        found |= _of_fields(cls, {"layer_types": kinds, "num_hidden_layers": len(kinds)})
    for part in getattr(cls, "sub_configs", {}):
        inner = getattr(cls(), part)
        if inner is None:
            continue
        kind = type(inner)
        if part == "text_config":
            found[part] = _settings(kind, kind.model_type) | own.get(part, {})
        else:
            found[part] = _of_fields(kind, VISION) | SETTINGS.get(kind.model_type, {}) | own.get(part, {})
        found[part]["model_type"] = kind.model_type
    return found | {k: v for k, v in own.items() if k not in getattr(cls, "sub_configs", {}) or k not in found}


def _of_fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(cls)}
    fields -= {field.name for field in dataclasses.fields(cls) if field.name in OWN and field.default is None}
    alias = getattr(cls, "attribute_map", {}) or {}
    return {alias.get(k, k): v for k, v in values.items() if alias.get(k, k) in fields}


BATCH_SEED = 3


def trial_batch() -> tuple[Batch, np.ndarray]:
    """Responses of unequal length to prompts of unequal length, and a coefficient for each."""
    of = batches.batch((3, 2, 1), seed=BATCH_SEED)
    return of, np.random.default_rng(4).normal(size=len(of)) / len(of)


class Reference:
    """A folder's model in transformers alone, in float64, one sequence at a time, without cache or padding."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        self.model, info = model_class(config).from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise ValueError(f"the folder lacks {sorted(info['missing_keys'])[:3]}")
        self.model.eval()
        for module in self.model.modules():  # transformers leaves out the gradient of the padding token's embedding
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None

    def logits(self, prompt: Tokens, response: Tokens) -> Any:
        """(T, V) float64: before each token of the response."""
        import torch

        ids = torch.tensor([[*prompt, *response]])
        given = {"attention_mask": torch.ones_like(ids)}
        return self.model(input_ids=ids, use_cache=False, **given).logits[0, len(prompt) - 1 : -1].double()

    def sums(self, of: Batch) -> Any:
        """(N,) float64 log-probs of the responses, differentiable."""
        import torch

        found = []
        for prompt, response in zip(of.prompts, of.responses, strict=True):
            chosen = torch.tensor(response)[:, None]
            found.append(self.logits(prompt, response).log_softmax(-1).gather(1, chosen).sum())
        return torch.stack(found)

    def logprobs(self, of: Batch) -> np.ndarray:
        """(N,) float64 log-probs of the responses."""
        import torch

        with torch.no_grad():
            return self.sums(of).numpy()

    def gradient_norm(self, of: Batch, coefficients: np.ndarray) -> float:
        """Norm of the gradient of sum_i c_i log pi_i over all parameters."""
        import torch

        self.model.zero_grad(set_to_none=True)
        (self.sums(of) * torch.from_numpy(coefficients)).sum().backward()
        return float(sum(float((p.grad**2).sum()) for p in self.model.parameters() if p.grad is not None) ** 0.5)

    def drawn_apart(self, prompt: Tokens, response: Tokens, numbers: np.ndarray) -> float:
        """How far the numbers that drew a response lie outside of its tokens' parts of the cumulative distribution."""
        import torch

        with torch.no_grad():
            masses = self.logits(prompt, response).softmax(-1).numpy()
        worst = 0.0
        for t, token in enumerate(response):
            above = masses[t, : token + 1].sum()
            worst = max(worst, above - masses[t, token] - numbers[t], numbers[t] - above)
        return worst
