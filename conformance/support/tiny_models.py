"""Tiny random language models and a byte tokenizer, made offline and saved as Hugging Face folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,  # equal to the end token on purpose
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}

FULL_ATTENTION: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "llama-tied-bias": {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **EXPERTS},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
}
"""Models whose packed rows are exact."""

OTHERS: dict[str, dict[str, Any]] = {
    "mistral-window": {"model_type": "mistral", "sliding_window": 6},
    "phi3-window": {"model_type": "phi3", "sliding_window": 6},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_oss": {"head_dim": 8, "sliding_window": 6, **EXPERTS},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
        **EXPERTS,
    },
}
"""Models that must take plain rows."""

_MAMBA = {"state_size": 8, "chunk_size": 4}
_DBRX = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32, "ffn_act_fn": {"name": "silu"}}
UNUSUAL: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA,
    "mamba2": _MAMBA | {"head_dim": 16, "num_heads": 4, "expand": 2, "n_groups": 2},
    "falcon_mamba": _MAMBA,
    "falcon_h1": {
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "phimoe": {"sliding_window": None, "router_jitter_noise": 0.2, "input_jitter_noise": 0.1, **EXPERTS},
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.1, **EXPERTS},
    "minimax": {
        "head_dim": 8,
        "block_size": 4,
        "router_jitter_noise": 0.1,
        "layer_types": ["linear_attention", "full_attention"],
        **EXPERTS,
    },
    "minimax_m2": {"head_dim": 8, "rotary_dim": 4, "router_jitter_noise": 0.1, **EXPERTS},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "resid_pdrop": 0.3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4, "attn_pdrop": 0.3},
        "ffn_config": {"moe_jitter_eps": 0.2, **_DBRX},
    },
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 64,
        "no_rope_layers": [1, 0],
        **EXPERTS,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3},
    "biogpt": {"layerdrop": 0.3},
    "falcon": {},
    "dynamic": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 4.0},
        "max_position_embeddings": 16,
    },
    "longrope": {
        "model_type": "phi3",
        "sliding_window": None,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 700.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 16,
        },
    },
}
"""Models that PyTorch alone takes: states beside keys and values, noise in training, RoPE by length."""


DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "llama3": {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 48},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
}
"""Plain decoders, with unusual settings, that `write_model` makes without PyTorch."""


def write_model(name: str, folder: Path, *, seed: int = 0, spread: float = 0.3, **changes: Any) -> Path:
    """Saves the tiny model of DECODERS and its tokenizer without PyTorch; the folder, for `ModelConfig.path`.

    Args:
      spread: standard deviation of the weights: large enough that the next token depends on the ones before.
      changes: settings of config.json in place of the family's own.
    """
    import json

    import numpy as np
    from safetensors.numpy import save_file
    from transformers import AutoConfig

    c = AutoConfig.for_model(**(SMALL | {"model_type": name} | DECODERS[name] | changes))
    family = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[c.model_type]
    c.architectures = [f"{family}ForCausalLM"]
    draw = np.random.default_rng(seed)
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    queries, keys = c.num_attention_heads * width, c.num_key_value_heads * width

    def matrix(*shape: int) -> "np.ndarray":
        return (spread * draw.standard_normal(shape)).astype(np.float32)

    def near(value: float, size: int) -> "np.ndarray":  # norms and biases away from one and zero: each one matters
        return (value + 0.1 * draw.standard_normal(size)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(c.vocab_size, c.hidden_size)}
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        sizes = {"q": (queries, c.hidden_size), "k": (keys, c.hidden_size), "v": (keys, c.hidden_size)}
        for which, shape in (sizes | {"o": (c.hidden_size, queries)}).items():
            tensors[f"{layer}self_attn.{which}_proj.weight"] = matrix(*shape)
            biased = getattr(c, "attention_bias", False) or (c.model_type == "qwen2" and which != "o")
            if biased:
                tensors[f"{layer}self_attn.{which}_proj.bias"] = near(0.0, shape[0])
        if c.model_type == "qwen3":
            tensors |= {f"{layer}self_attn.{which}_norm.weight": near(1.0, width) for which in "qk"}
        for which, shape in {
            "gate": (c.intermediate_size, c.hidden_size),
            "up": (c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
        }.items():
            tensors[f"{layer}mlp.{which}_proj.weight"] = matrix(*shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = near(1.0, c.hidden_size)
    tensors["model.norm.weight"] = near(1.0, c.hidden_size)
    if not c.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(c.vocab_size, c.hidden_size)
    folder.mkdir(parents=True, exist_ok=True)
    c.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "pad_token_id": 0}))
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> Any:
    """A tokenizer of printable ASCII, one token a character, with four special tokens and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(c) for c in range(32, 127))][: VOCABULARY - len(SPECIAL)]
    ids = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], unk_token="?"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(name: str, folder: Path, *, seed: int = 0, spread: float = 0.3, **changes: Any) -> Path:
    """Saves the tiny model of FULL_ATTENTION, OTHERS or UNUSUAL and its tokenizer; the folder, for `ModelConfig.path`.

    Args:
      spread: standard deviation of the weights: large enough that the next token depends on the ones before.
      changes: settings of config.json in place of the family's own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own = (FULL_ATTENTION | OTHERS | UNUSUAL)[name]
    settings = SMALL | {"model_type": name, "initializer_range": spread} | own | changes
    config = AutoConfig.for_model(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim < 2:  # norms and biases away from one and zero, so that each one matters
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def changed(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """A copy of a model's folder with other settings in config.json; None takes one out."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | settings
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return copy


def made_once(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a family -> its model's folder; see `make_model`."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder
