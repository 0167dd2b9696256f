"""The table of models that gvpo_jax supports, and config.json read with it. Every setting is applied or rejected."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.hugging_face import check_window
from gvpo_core.training.policy.weight_files import refuse_quantization
from gvpo_jax.rope import read_rope
from gvpo_jax.spec import NO_WINDOW, Family, Layer, Rope, Spec

_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GEMMA: dict[str, Any] = {
    "wide_norms": True,
    "norms": _SANDWICH,
    "biases": "qkvo",
    "windows": "types",
    "activation": "hidden_activation",
    "embedding_scale": "root",
    "logit_cap": True,
}
_OLMO: dict[str, Any] = {"norms": _AFTER, "qk_norms": "row", "wide_norms": True, "biases": "qkvo"}
_GLM: dict[str, Any] = {"biases": "qkv", "fused_mlp": True, "partial": True, "interleaved": True}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", biases="qkvo", mlp_bias=True),
    "mistral": Family("MistralForCausalLM", windows="all"),
    "qwen2": Family("Qwen2ForCausalLM", fixed_biases="qkv", windows="switched"),
    "qwen3": Family("Qwen3ForCausalLM", qk_norms="head", biases="qkvo", windows="switched"),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", qk_norms="head", biases="qkvo", windows="all", sparse=True
    ),  # its sliding_window is None unless use_sliding_window is set
    "gemma2": Family(
        "Gemma2ForCausalLM", offset=True, attention_scale="query_pre_attn_scalar", attention_cap=True, **_GEMMA
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", offset=True, qk_norms="head", attention_scale="query_pre_attn_scalar", **_GEMMA
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM", qk_norms="head", value_norm=True, attention_scale="one", layer_scalar=True, **_GEMMA
    ),
    "phi3": Family("Phi3ForCausalLM", fused=True, fused_mlp=True, partial=True, windows="all"),
    "olmo2": Family("Olmo2ForCausalLM", **_OLMO),
    "olmo3": Family("Olmo3ForCausalLM", windows="types", **_OLMO),
    "smollm3": Family("SmolLM3ForCausalLM", biases="qkvo", mlp_bias=True, windows="types"),
    "granite": Family(
        "GraniteForCausalLM",
        biases="qkvo",
        mlp_bias=True,
        attention_scale="attention_multiplier",
        embedding_scale="embedding_multiplier",
    ),
    "glm": Family("GlmForCausalLM", **_GLM),
    "glm4": Family(
        "Glm4ForCausalLM",
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        **_GLM,
    ),
}
TEXT_OF = {"gemma3": "Gemma3ForConditionalGeneration", "gemma4": "Gemma4ForConditionalGeneration"}
"""Multimodal models; gvpo_jax uses their language model only."""
OTHER_MODALITIES = ("vision_tower.", "multi_modal_projector.", "embed_vision.", "audio_tower.", "embed_audio.")
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new")
SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "max_window_layers",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "no_rope_layers",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "attention_multiplier",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "enable_moe_block",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
)
"""The settings that `read_spec` reads, except RoPE and layer types."""


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json of the language model of a multimodal model; any other config.json unchanged."""
    if config.get("model_type") not in TEXT_OF or not isinstance(config.get("text_config"), Mapping):
        return dict(config)
    from transformers import AutoConfig

    refuse_quantization(config, "gvpo_jax")
    inner = dict(config["text_config"])
    if config["model_type"] == "gemma3" and inner.get("final_logit_softcapping") is not None:
        raise ConfigError(f"{TEXT_OF['gemma3']} has final_logit_softcapping, which transformers ignores in this model")
    kind = inner.pop("model_type", f"{config['model_type']}_text")
    if "tie_word_embeddings" in config:
        inner["tie_word_embeddings"] = config["tie_word_embeddings"]
    settings: dict[str, Any] = AutoConfig.for_model(kind, **inner).to_dict()
    family = FAMILIES.get(kind)
    return settings | {"model_type": kind, "architectures": [family.architecture] if family else None}


def read_spec(config: Mapping[str, Any]) -> Spec:
    """Returns the model that config.json describes. `hugging_face.read_config` must have completed it.

    Raises: ConfigError: unsupported architecture, RoPE type, activation or quantisation; the message names it.
    """
    config = text_config(config)
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    named = (config.get("architectures") or [family.architecture if family else None])[0]
    if family is None or named != family.architecture:
        raise ConfigError(
            f"gvpo_jax does not know the architecture {named} (model_type {kind}); it knows "
            f"{', '.join(f.architecture for f in FAMILIES.values())}. docs/models.md says which backend takes which"
        )
    refuse_quantization(config, "gvpo_jax")
    check_window(config)
    _refuse(config, named)
    each, ropes = _layers(config, family)
    width = each[0].width
    heads = config["num_attention_heads"]
    if family.attention_scale in ("width", "one"):
        scale = width**-0.5 if family.attention_scale == "width" else 1.0
    else:
        scale = float(config[family.attention_scale])
        scale = scale**-0.5 if family.attention_scale == "query_pre_attn_scalar" else scale
    embedding = 1.0
    if family.embedding_scale:
        root = family.embedding_scale == "root"
        embedding = config["hidden_size"] ** 0.5 if root else float(config.get(family.embedding_scale, 1.0))
    granite = kind == "granite"
    cap = lambda read, name: float(config[name]) if read and config.get(name) is not None else None
    return Spec(
        family=family,
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        heads=heads,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        tied=bool(config.get("tie_word_embeddings", False)),
        each=each,
        ropes=ropes,
        biases=family.fixed_biases or (family.biases if config.get("attention_bias") else ""),
        mlp_bias=family.mlp_bias and bool(config.get("mlp_bias")),
        activation=config.get(family.activation, "silu"),
        attention_scale=scale,
        attention_cap=cap(family.attention_cap, "attn_logit_softcapping"),
        logit_cap=cap(family.logit_cap, "final_logit_softcapping"),
        logit_scale=1.0 / config.get("logits_scaling", 1.0) if granite else 1.0,
        embedding_scale=embedding,
        residual_scale=float(config.get("residual_multiplier", 1.0)) if granite else 1.0,
        inputs=int(config.get("hidden_size_per_layer_input") or 0) if kind == "gemma4_text" else 0,
        inputs_vocabulary=int(config.get("vocab_size_per_layer_input") or 0),
        **_experts(config, family),
    )


def _refuse(config: Mapping[str, Any], named: str) -> None:
    family = FAMILIES[config["model_type"]]
    activation = config.get(family.activation, "silu")
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{family.activation} of {named} is {activation!r}; gvpo_jax knows {', '.join(ACTIVATIONS[:-1])}"
        )
    if config.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise ConfigError(f"{named} has use_bidirectional_attention: gvpo_jax supports causal attention only")
    if config.get("enable_moe_block"):
        raise ConfigError(f"{named} has enable_moe_block = true; gvpo_jax supports its dense layers only")
    if config.get("attn_logit_softcapping") is not None and not family.attention_cap:
        raise ConfigError(f"{named} has attn_logit_softcapping, which transformers ignores in this model")
    other = sorted(set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    if other:
        raise ConfigError(
            f"{named} has layers of type {', '.join(other)}; gvpo_jax supports full and sliding attention"
        )


def _experts(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    if not family.sparse:
        return {}
    return {
        "experts": config.get("num_experts") or config["num_local_experts"],
        "experts_a_token": config["num_experts_per_tok"],
        "expert_width": config["moe_intermediate_size"],
        "experts_normalised": bool(config.get("norm_topk_prob", False)),
    }


def _layers(config: Mapping[str, Any], family: Family) -> tuple[tuple[Layer, ...], tuple[Rope, ...]]:
    count, heads = config["num_hidden_layers"], config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    types = config.get("layer_types") or ["full_attention"] * count
    of_type = {kind: (width, config.get("num_key_value_heads") or heads) for kind in ("full_attention", *types)}
    by_layer = [of_type[types[i]] for i in range(count)]
    if family.layer_scalar:
        by_layer = [_gemma4_heads(config, i, types[i], by_layer[i]) for i in range(count)]
    ropes: list[Rope] = []
    each = []
    windows = _windows(config, family)
    no_rope = config.get("no_rope_layers") if config["model_type"] == "smollm3" else None
    for i in range(count):
        rope = read_rope(config, types[i], by_layer[i][0], family.partial)
        if no_rope and not no_rope[i]:
            rope = Rope((0.0,) * len(rope.frequencies))  # angles of zero: no rotation
        if rope not in ropes:
            ropes.append(rope)
        layer = Layer(
            width=by_layer[i][0],
            key_heads=by_layer[i][1],
            intermediate=config["intermediate_size"],
            window=windows[i],
            rope=ropes.index(rope),
            sparse=family.sparse and _is_sparse(config, i),
        )
        each.append(_shared(config, i, layer, types) if family.layer_scalar else layer)
    return tuple(each), tuple(ropes)


def _windows(config: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """Returns the window of each layer: how many tokens back it sees."""
    count, window, how = config["num_hidden_layers"], config.get("sliding_window"), family.windows
    switched_off = how == "switched" or config["model_type"] == "qwen3_moe"
    if not how or window is None or (switched_off and not config.get("use_sliding_window", False)):
        return (NO_WINDOW,) * count
    if how == "all":
        return (int(window),) * count
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= config.get("max_window_layers", 28) else "full_attention" for i in range(count)
    ]
    return tuple(int(window) if kind == "sliding_attention" else NO_WINDOW for kind in kinds)


def _is_sparse(config: Mapping[str, Any], i: int) -> bool:
    dense = i in (config.get("mlp_only_layers") or ())
    return not dense and (i + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _gemma4_heads(config: Mapping[str, Any], i: int, kind: str, usual: tuple[int, int]) -> tuple[int, int]:
    """Returns head width and number of key heads. Full-attention layers have their own values."""
    if "per_layer_config" in config:
        of_layer = (config["per_layer_config"] or {}).get(str(i)) or (config["per_layer_config"] or {}).get(i) or {}
        return int(of_layer.get("head_dim", usual[0])), int(of_layer.get("num_key_value_heads", usual[1]))
    if kind != "full_attention":
        return usual
    keys = config.get("num_global_key_value_heads") if config.get("attention_k_eq_v") else None
    return int(config.get("global_head_dim", 512)), int(keys or usual[1])


def _shared(config: Mapping[str, Any], i: int, layer: Layer, types: list[str]) -> Layer:
    """Completes a layer of Gemma 4. Its last layers read keys and values of an earlier layer of the same type."""
    first = config["num_hidden_layers"] - int(config.get("num_kv_shared_layers") or 0)
    full = types[i] == "full_attention"
    settings: dict[str, Any] = {"values": not (config.get("attention_k_eq_v") and full)}
    if i >= first:
        sources = [j for j in range(first) if types[j] == types[i]]
        if not sources:
            raise ConfigError(f"num_kv_shared_layers leaves no layer of type {types[i]} with keys of its own")
        wide = 2 if config.get("use_double_wide_mlp") else 1
        settings |= {"source": sources[-1], "intermediate": layer.intermediate * wide}
    return replace(layer, **settings)
