"""Makes a tiny random Llama with one token per character and a chat template, and nine games."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER = Path(".cache/guess_number")
MODEL, GAMES = FOLDER / "model", FOLDER / "games.jsonl"
END = "<|end|>"
TOKENS = [END, "?", "<", ">", "!", ":", *"123456789"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}:{{ m.content }}<|end|>{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def prepare() -> None:
    """Writes the model, if it is missing, and the games."""
    if not (MODEL / "config.json").exists():
        save_model(MODEL)
    GAMES.write_text("".join(json.dumps({"secret": secret}) + "\n" for secret in range(1, 10)))


def save_model(folder: Path, hidden: int = 64) -> None:
    """Writes a Hugging Face folder: 2 layers, weights from a fixed seed."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(TOKENS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    draw = np.random.default_rng(0)
    matrix = lambda *shape: (shape[-1] ** -0.5 * draw.standard_normal(shape)).astype(np.float32)
    weights = {name: matrix(len(TOKENS), hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    for i in range(2):
        layer = f"model.layers.{i}."
        weights |= {f"{layer}self_attn.{x}_proj.weight": matrix(hidden, hidden) for x in "qo"}
        weights |= {f"{layer}self_attn.{x}_proj.weight": matrix(hidden // 2, hidden) for x in "kv"}
        weights |= {f"{layer}mlp.{x}_proj.weight": matrix(2 * hidden, hidden) for x in ("gate", "up")}
        weights[f"{layer}mlp.down_proj.weight"] = matrix(hidden, 2 * hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"] = np.ones(hidden, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    prepare()
