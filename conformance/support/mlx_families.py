"""Families of mlx-lm beside those of `tiny_models`, as transformers saves them, and those that are refused."""

from typing import Any

from tiny_models import EXPERTS, OTHERS

_LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_HYBRID: dict[str, Any] = {
    "layer_types": ["attention", "attention"],
    "shared_intermediate_size": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    **EXPERTS,
}
_SLIDING = ["sliding_attention", "full_attention"]

EXACT: dict[str, dict[str, Any]] = {
    "qwen3_next": OTHERS["qwen3_next"],
    "qwen3_5_text": _LINEAR | {"tie_word_embeddings": False},
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_dim": 32,
        "conv_dim": 32,
        "conv_dim_out": 32,
        "block_ff_dim": 48,
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "full_attn_idxs": [1],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **EXPERTS},
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "granitemoehybrid": _HYBRID | {"position_embedding_type": "rope"},
    "granitemoehybrid-null": _HYBRID | {"model_type": "granitemoehybrid", "position_embedding_type": None},
    "mixtral": EXPERTS,
    "granitemoe": EXPERTS,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm4_moe": _LATENT | {"head_dim": 8},
    "dots1": _LATENT | {"head_dim": 8},
    "afmoe": {
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": _SLIDING,
        **EXPERTS,
    },
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "stablelm": {},
    "llama-yarn": {
        "model_type": "llama",
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 700.0,
            "factor": 4.0,
            "original_max_position_embeddings": 300,
            "truncate": False,
            "attention_factor": 1.3,
        },
    },
    "gemma2": OTHERS["gemma2"],
    "gemma3_text": OTHERS["gemma3_text"] | {"num_hidden_layers": 6},
    "mistral-window": OTHERS["mistral-window"],
    "phi3-window": OTHERS["phi3-window"],
    "qwen2-window": OTHERS["qwen2-window"],
}
"""Loaded, trained and exported as transformers has them."""

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", *_SLIDING],
        },
        "vision_config": _VISION | {"model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4,
        "image_token_index": 95,
        "boi_token_index": 94,
        "eoi_token_index": 93,
    },
    "qwen3_5": {
        "text_config": _LINEAR | {"model_type": "qwen3_5_text"},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        "tie_word_embeddings": False,
        "image_token_id": 95,
        "video_token_id": 94,
        "vision_start_token_id": 93,
        "vision_end_token_id": 92,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 95,
    },
}
"""Released as models of text and images; their settings are in `text_config`."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
        "drops .*e_score_correction_bias, which transformers reads",
    ),
    "gpt_oss": (OTHERS["gpt_oss"], "does not use, the first model.layers.0.mlp.experts"),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}, "no decoder `model`"),
}
"""Refused by name: what mlx-lm drops or does not read."""
