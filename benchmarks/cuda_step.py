"""A training step of Qwen2.5-1.5B's shape on one GPU, from random weights: sampling, scoring, update and peak memory.

python benchmarks/cuda_step.py                         one JSON line for each measurement; needs a CUDA device
python benchmarks/cuda_step.py --kinds lora nf4        some of the kinds of training
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance" / "support"))
import tiny_models
from batches import sections
from gvpo_torch import load

from gvpo_core.training.policy import Batch
from gvpo_core.training.sampling import Sampling, row_seed

QWEN = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
QWEN |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True}
GROUP, PROMPT, RESPONSE = 8, 512, 2048  # responses per prompt, tokens, most tokens
TOKENS = 128  # sampled per row when sampling is measured
KINDS: dict[str, dict[str, object]] = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "compile": {"compile": True},
    "adamw_8bit": {"name": "adamw_8bit"},
    "lora": {"lora_rank": 16},
    "nf4": {"lora_rank": 16, "quantization": "nf4"},
    "dora": {"lora_rank": 16, "lora_kind": "dora"},
    "deterministic": {"deterministic": True},
}
SAMPLED = ("full", "lora", "nf4")  # kinds whose sampling is measured


@contextmanager
def measured(what: str, **facts: float) -> Iterator[dict[str, float]]:
    """Measures a block. Prints its seconds and peak GiB, and the facts that the block adds."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    figures: dict[str, float] = dict(facts)
    start = time.perf_counter()
    yield figures
    torch.cuda.synchronize()
    figures["seconds"] = seconds = time.perf_counter() - start
    figures.setdefault("peak_gib", torch.cuda.max_memory_allocated() / 2**30)
    if "tokens" in figures:
        figures["tokens_per_second"] = figures["tokens"] / seconds
    if "flops" in figures:
        figures["tflops"] = figures["flops"] / seconds / 1e12
    print(json.dumps({"what": what} | {name: round(value, 3) for name, value in figures.items()}), flush=True)


def make_folder(folder: Path, settings: dict[str, object], device: str = "cuda") -> Path:
    """Writes a model of random weights, and a tokenizer that has only an end token."""
    config = Qwen2Config(**settings, max_position_embeddings=32768, dtype="bfloat16", eos_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder


def draw(prompts: int, vocabulary: int, prompt: int, response: int) -> Batch:
    """Returns groups with prompts of one length. Response lengths are log-normal; median: a quarter of the limit."""
    generator = np.random.default_rng(0)
    texts, responses, groups = [], [], []
    for group in range(prompts):
        text = tuple(generator.integers(1, vocabulary, prompt).tolist())
        for _ in range(GROUP):
            length = int(min(response, max(1, generator.lognormal(np.log(response / 4), 0.8))))
            texts.append(text)
            responses.append((*generator.integers(1, vocabulary, length - 1).tolist(), 0))
            groups.append(group)
    return Batch(texts, responses, groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="training kinds; default: all")
    options = parser.parse_args()
    small = options.small
    shape = SMALL if small else QWEN
    prompt, response, prompts = (16, 32, 4) if small else (PROMPT, RESPONSE, 16)
    vocabulary = int(shape["vocab_size"])
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary), shape)
        batch = draw(prompts, vocabulary, prompt, response)
        sampled = sum(map(len, batch.responses))
        packed = sampled + prompts * prompt
        texts = [batch.prompts[i] for i in range(0, len(batch), GROUP)]
        for kind in options.kinds:
            settings = {"dtype": "bfloat16", "micro_batch_tokens": 16384} | KINDS[kind]
            model, optimizer = sections(folder, "cuda", settings)
            with measured(f"{kind}: load"):
                policy = load(model, optimizer, updates=10, reference=False, seed=0)
            assert policy.scorer.decodes_fixed, "the model is not decoded in fixed buffers"
            parameters = policy.describe().parameters
            products = 4 if "lora_rank" in KINDS[kind] else 6  # a frozen weight has no gradient
            if kind in SAMPLED:
                for rows in (16, 128, 512):
                    some = texts[: max(1, min(rows, len(batch)) // GROUP)]
                    seeds = [[row_seed(0, i, j) for j in range(rows // len(some))] for i in range(len(some))]
                    for loop, fixed in (("plain loop", False), ("fixed buffers", True)):
                        policy.scorer.decodes_fixed = fixed
                        policy.generate(some, seeds, Sampling(4))
                        with measured(f"{kind}: sample {rows} rows, {loop}") as figures:
                            drawn = policy.generate(some, seeds, Sampling(min(TOKENS, response)))
                            figures["tokens"] = sum(len(r.tokens) for row in drawn for r in row)
                            figures["longest"] = longest = max(len(r.tokens) for row in drawn for r in row)
                        torch.cuda.synchronize()
                        print(f"  {1000 * figures['seconds'] / longest:.1f} ms per token of a row")
            policy.logprobs(batch.take(list(range(GROUP))))
            with measured(f"{kind}: score", tokens=packed, flops=2 * parameters * packed):
                policy.logprobs(batch)
            for number in range(3):
                with measured(
                    f"{kind}: update {number}", tokens=packed, flops=products * parameters * packed
                ) as figures:
                    update = policy.update(batch, lambda logprobs, rows: np.where(np.arange(len(rows)) % 2, 0.1, -0.1))
                    figures["peak_gib"] = update.peak_memory / 2**30  # the policy reads and resets the device's count
            del policy


if __name__ == "__main__":
    main()
