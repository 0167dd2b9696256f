"""Forward and backward of the demo's batch in packed and in plain rows, interleaved in one run.

    python benchmarks/packed_speed.py [--model FOLDER] [--rounds 3]

4 prompts of 45 tokens with 8 responses of 6 to 12 tokens each, float32. Exits with an error where packed rows are not
at least --bound times as fast.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gvpo_torch import layout, model
from gvpo_torch.ranks import Ranks

from gvpo_core.training.config import ModelConfig
from gvpo_core.training.policy import Batch


def demo_model() -> Path:
    """The demo's SmolLM2, made where it is not there yet."""
    demo = Path(__file__).parent.parent / "examples" / "smollm2_arithmetic"
    sys.path.insert(0, str(demo))
    import prepare

    prepare.CACHE.mkdir(parents=True, exist_ok=True)
    if not (prepare.MODEL / "config.json").exists():
        prepare.save_model(prepare.MODEL)
    return prepare.MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a Hugging Face folder; default: the demo's SmolLM2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bound", type=float, default=4.0)
    options = parser.parse_args()
    config = ModelConfig(path=options.model or str(demo_model()))
    device = Ranks(config).device
    scorer, _ = model.load_scorer(config, device, 0)
    draw = np.random.default_rng(0)
    rows = []
    for group in range(4):
        prompt = tuple(draw.integers(5, 1000, 45).tolist())
        rows += [(prompt, tuple(draw.integers(5, 1000, int(draw.integers(6, 13))).tolist()), group) for _ in range(8)]
    batch = Batch(*(list(x) for x in zip(*rows, strict=True)))
    arrays = {
        name: layout.arrays(batch, layout.plan_rows(batch, packed=name == "packed", tokens=1 << 20))
        for name in ("packed", "plain")
    }
    seconds: dict[str, list[float]] = {"packed": [], "plain": []}
    gradients = {}
    for number in range(options.rounds + 1):  # the first warms up
        for name, of in arrays.items():
            scorer.zero_grad(set_to_none=True)
            start = time.perf_counter()
            model.score(scorer, of, device).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
            gradients[name] = [p.grad.clone() for p in scorer.parameters()] if number == 0 else None
        if number == 0:
            pairs = zip(gradients["packed"], gradients["plain"], strict=True)
            apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            print(f"largest relative difference of a parameter's gradient: {apart:.1e}")
            if apart > 1e-3:
                sys.exit("packed and plain gradients differ")
    for name, of in arrays.items():
        typical = statistics.median(seconds[name])
        print(f"{name:7} {of.ids.shape[0]:3} rows of {of.ids.shape[1]:4}: {typical:7.3f} s a forward + backward")
    ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["packed"])
    print(f"packed is {ratio:.1f} times as fast on {device} ({torch.get_num_threads()} threads)")
    if ratio < options.bound:
        sys.exit(f"wanted at least {options.bound}")


if __name__ == "__main__":
    main()
