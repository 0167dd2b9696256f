"""Makes a tiny random Llama with one token per letter, and prompts. Needs no download and no framework."""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

FOLDER = Path(".cache/ascending_letters")
MODEL, TRAIN, HELD_OUT = FOLDER / "model", FOLDER / "train.jsonl", FOLDER / "held_out.jsonl"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = "<|end|>"


def prepare() -> None:
    """Writes the model, if it is missing, and the prompts."""
    if not (MODEL / "config.json").exists():
        save_model(MODEL)
    draw = random.Random(0)
    words = sorted({"".join(draw.choices(LETTERS, k=3)) for _ in range(200)})
    draw.shuffle(words)
    for path, part in ((TRAIN, words[:120]), (HELD_OUT, words[120:160])):
        path.write_text("".join(json.dumps({"prompt": f"{word}:"}) + "\n" for word in part))


def save_model(folder: Path) -> None:
    """Writes a Hugging Face folder: 2 layers of width 64; 26 letters, a colon and an end token; a fixed seed."""
    tokens = [END, ":", *LETTERS]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
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
    hidden, inner, keys = 64, 128, 32
    weights = {"model.embed_tokens.weight": matrix(len(tokens), hidden), "lm_head.weight": matrix(len(tokens), hidden)}
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    for i in range(2):
        layer = f"model.layers.{i}."
        weights |= {f"{layer}self_attn.{x}_proj.weight": matrix(hidden, hidden) for x in "qo"}
        weights |= {f"{layer}self_attn.{x}_proj.weight": matrix(keys, hidden) for x in "kv"}
        weights |= {f"{layer}mlp.{x}_proj.weight": matrix(inner, hidden) for x in ("gate", "up")}
        weights[f"{layer}mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{norm}.weight"] = np.ones(hidden, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=END).save_pretrained(
        folder
    )
    config.save_pretrained(folder)


if __name__ == "__main__":
    prepare()
