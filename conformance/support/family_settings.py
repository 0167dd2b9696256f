"""What families' tiny models need beside the sizes that all take: see `families`. The keys are model types."""

from typing import Any

VOCABULARY = 96
THREE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}  # positions of text, height, width
SETTINGS: dict[str, dict[str, Any]] = {
    "apertus": {"post_norm": False, "qk_norm": True, "mlp_bias": False},  # released config.json files have them
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16]},
    "exaone4": {"head_dim": 8},
    "gemma3": {"vocab_size": VOCABULARY},  # mlx-lm reads it there
    "glm4v_text": {"rope_parameters": THREE},
    "glm4v_moe_text": {"rope_parameters": THREE | {"mrope_section": [1, 1, 0]}},
    "gpt2": {"n_ctx": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "inkling2_loop_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nanochat": {"final_logit_softcapping": 15.0},
    "qwen2_vl_text": {"rope_parameters": THREE},
    "qwen2_5_vl_text": {"rope_parameters": THREE},
    "qwen3_vl_text": {"rope_parameters": THREE | {"mrope_interleaved": True}},
    "qwen3_vl_moe_text": {"rope_parameters": THREE | {"mrope_interleaved": True}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "hc_count": 2,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention"), "attention_window_size": 6, "lru_width": 32},
    "youtu": {"pad_token_id": None},  # its padding row is zero when loaded, where a norm's slope is 1e3
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
