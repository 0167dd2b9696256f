"""Time of forward and backward of the demo's batch in packed and in padded rows, interleaved in one run.

    python benchmarks/packed_speed.py [--model FOLDER] [--rounds 3]

4 prompts of 45 tokens with 16 responses of 6 to 12 tokens each, float32, three ways:

    packed  a prompt once with its responses after it; the head on response positions only
    plain   one padded row per response; the head on response positions only
    padded  one padded row per response through transformers' own forward, log_softmax over its logits

Exits with an error if packed rows are not at least --bound times as fast as padded ones. CPU seconds are printed too,
because other programs on the machine change them less.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gvpo_torch import model
from gvpo_torch.ranks import Ranks

from gvpo_core.training.config import ModelConfig
from gvpo_core.training.policy import Batch, layout


def demo_model() -> Path:
    """Returns the folder of the demo's SmolLM2. Makes it if it is missing."""
    demo = Path(__file__).parent.parent / "examples" / "smollm2_arithmetic"
    sys.path.insert(0, str(demo))
    import prepare

    prepare.CACHE.mkdir(parents=True, exist_ok=True)
    if not (prepare.MODEL / "config.json").exists():
        prepare.save_model(prepare.MODEL)
    return prepare.MODEL


def padded(scorer: model.Scorer, arrays: layout.Arrays, device: torch.device) -> torch.Tensor:
    """Returns log-probs the usual way: all logits of the padded rows, then log_softmax, then the response tokens."""
    ids, mask = (torch.from_numpy(x).to(device) for x in (arrays.ids, arrays.segments >= 0))
    logits = scorer.base(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logprobs = logits.log_softmax(-1).flatten(0, 1)
    predict, targets = (torch.from_numpy(x).to(device) for x in (arrays.predict, arrays.targets))
    return logprobs[predict, targets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a Hugging Face folder; default: the demo's SmolLM2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bound", type=float, default=4.0)
    options = parser.parse_args()
    config = ModelConfig(path=options.model or str(demo_model()))
    device = Ranks(config).device
    scorer = model.load_scorer(config, device, 0)
    draw = np.random.default_rng(0)
    rows = []
    for group in range(4):
        prompt = tuple(draw.integers(5, 1000, 45).tolist())
        rows += [(prompt, tuple(draw.integers(5, 1000, int(draw.integers(6, 13))).tolist()), group) for _ in range(16)]
    batch = Batch(*(list(x) for x in zip(*rows, strict=True)))
    arrays = {
        name: layout.arrays(batch, layout.plan_rows(batch, packed=name == "packed", tokens=1 << 20))
        for name in ("packed", "plain", "padded")
    }
    seconds: dict[str, list[float]] = {name: [] for name in arrays}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in arrays}
    gradients = {}
    for number in range(options.rounds + 1):  # the first warms up
        for name, of in arrays.items():
            scorer.zero_grad(set_to_none=True)
            start, cpu_start = time.perf_counter(), time.process_time()
            values = (padded if name == "padded" else model.score)(scorer, of, device)
            values.backward(torch.from_numpy(of.spread(np.ones(len(of.responses)))).to(values))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
            else:
                gradients[name] = [p.grad.clone() for p in scorer.parameters()]
        if number == 0:
            for name in ("plain", "padded"):
                pairs = zip(gradients["packed"], gradients[name], strict=True)
                apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
                print(f"packed and {name}: largest relative difference of a parameter's gradient {apart:.1e}")
                if apart > 1e-3:
                    sys.exit(f"packed and {name} gradients differ")
            gradients.clear()
    for name, of in arrays.items():
        wall, cpu = statistics.median(seconds[name]), statistics.median(cpu_seconds[name])
        shape = f"{of.ids.shape[0]:3} rows of {of.ids.shape[1]:4}"
        print(f"{name:7} {shape}: {wall:7.3f} s per forward + backward ({cpu:.3f} CPU seconds)")
    of_plain, ratio = (
        statistics.median(seconds[name]) / statistics.median(seconds["packed"]) for name in ("plain", "padded")
    )
    print(
        f"packed is {of_plain:.1f} times as fast as plain and {ratio:.1f} times as fast as padded "
        f"on {device} ({torch.get_num_threads()} threads)"
    )
    if ratio < options.bound:
        sys.exit(f"expected at least {options.bound}")


if __name__ == "__main__":
    main()
