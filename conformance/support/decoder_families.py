"""Tiny models of the families that gvpo_jax knows, made by transformers, in which every number matters."""

from pathlib import Path
from typing import Any

import tiny_models

ROPE = {"rope_type": "default", "rope_theta": 700.0}
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 32}
TYPES = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 12, "sliding_window": 5, "layer_types": TYPES}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 9000.0, "factor": 4.0},
}
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 9000.0, "partial_rotary_factor": 0.5},
}
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 5,
    "rope_parameters": GEMMA4_ROPE,
    "final_logit_softcapping": 4.0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
        **GEMMA,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 20,
        "final_logit_softcapping": 4.0,
        "rope_parameters": GEMMA3_ROPE,
        **GEMMA,
    },
    "gemma4-wide": {  # layers of full attention have their own heads, and values that are their keys
        "model_type": "gemma4_text",
        "layer_types": TYPES,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        **GEMMA4,
    },
    "gemma4-shared": {  # each layer has inputs of its own, and the last ones read the keys of others
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": TYPES * 2,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": tiny_models.VOCABULARY,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        **GEMMA4,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "norm_topk_prob": True,
        "rope_parameters": YARN,
        **tiny_models.EXPERTS,
    },
    "qwen3_moe-mixed": {  # a dense layer first
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "norm_topk_prob": False,
        **tiny_models.EXPERTS,
        "mlp_only_layers": [0],
    },
    "phi3": {"model_type": "phi3", "sliding_window": 6},
    "phi4": {
        "model_type": "phi3",
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 700.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.5, 2.0],
            "long_factor": [3.0, 5.0],
        },
    },
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 5,
        "layer_types": TYPES,
        "rope_parameters": {"sliding_attention": ROPE, "full_attention": YARN | {"attention_factor": 1.2}},
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True},
    "granite": {
        "model_type": "granite",
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "attention_bias": True,
    },
    "glm4": {
        "model_type": "glm4",
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
    },
    "glm": {"model_type": "glm", "head_dim": 16, "attention_bias": True},
    "llama-yarn": {"model_type": "llama", "rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0}},
}


def make(name: str, folder: Path, *, seed: int = 0, spread: float = 0.3, **changes: Any) -> Path:
    """Saves a tiny model of FAMILIES and its tokenizer; the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = tiny_models.SMALL | {"initializer_range": spread} | FAMILIES[name] | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:  # norms and biases away from one and zero, so that each one matters
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for own, constant in model.named_buffers():
                if own.endswith("layer_scalar"):
                    constant.fill_(float(torch.rand(())) + 0.5)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


def make_with_images(name: str, folder: Path) -> Path:
    """A tiny Gemma 3 or 4 of text and images, as its authors publish it."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = tiny_models.SMALL | {"initializer_range": 0.3} | FAMILIES["gemma3" if name == "gemma3" else "gemma4-wide"]
    if name == "gemma3":
        text = text | {"final_logit_softcapping": None}  # which transformers ignores in the model of images
    vision: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    if name == "gemma4":
        vision |= {"num_key_value_heads": 2, "head_dim": 8, "model_type": "gemma4_vision"}
    config = AutoConfig.for_model(name, text_config=text, vision_config=vision, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


def make_qwen_with_images(folder: Path, text: dict[str, Any]) -> Path:
    """A tiny Qwen 3.5 of text and images around a text model's configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision | {"patch_size": 4})
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder
