"""Linear layers of few rows while sampling on CPU: x W^T, or (W x^T)^T, which gvpo_torch takes on Intel CPUs.

    nox -s bench -- skinny_products

SmolLM2-135M's and Qwen2.5-0.5B's layers in float32 on 16 to 48 rows. CPU seconds, the two interleaved, so that other
programs on the machine disturb both alike. gvpo_torch decides by the CPU's vendor and not by a clock at start: the two
round differently, so a choice that may differ between two starts would keep a resumed run from repeating its samples.
This benchmark holds the rule instead.

Exit status: 0 if the product that this CPU takes costs at most 1.05 of the other one (geometric mean), 1 beyond.
"""

import statistics
import sys
import time
from functools import partial

import torch
from gvpo_torch import generate
from torch import nn

BOUND = 1.05
ROWS, ROUNDS = (16, 32, 48), 15
LAYERS = {"SmolLM2-135M": (576, 192, 1536), "Qwen2.5-0.5B": (896, 128, 4864)}  # hidden, keys, inner


def layers(hidden: int, keys: int, inner: int) -> list[nn.Linear]:
    """Those of a decoder layer."""
    sizes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    return [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in sizes]


def seconds(of: list[nn.Linear], inputs: dict[int, torch.Tensor], transposed: bool) -> float:
    """CPU seconds of the layers' products."""
    calls = [partial(generate._linear, layer) if transposed else layer for layer in of]
    start = time.process_time()
    for _ in range(4):
        for layer, call in zip(of, calls, strict=True):
            call(inputs[layer.in_features])
    return time.process_time() - start


def main() -> int:
    torch.manual_seed(0)
    takes = generate._wins_transposed()
    print(f"this CPU takes {'(W x^T)^T' if takes else 'x W^T'}; {torch.get_num_threads()} threads")
    ratios = []
    for name, sizes in LAYERS.items():
        of = [layer.requires_grad_(False) for layer in layers(*sizes)]
        for rows in ROWS:
            inputs = {n: torch.randn(rows, 1, n) for n in {layer.in_features for layer in of}}
            plain, transposed = [], []
            for _ in range(ROUNDS):
                plain.append(seconds(of, inputs, False))
                transposed.append(seconds(of, inputs, True))
            ratio = statistics.median(transposed) / statistics.median(plain)
            print(f"{name:14} {rows:2} rows: (W x^T)^T costs {ratio:.2f} of x W^T", flush=True)
            ratios.append(ratio if takes else 1 / ratio)
    mean = statistics.geometric_mean(ratios)
    print(f"the product that is taken costs {mean:.2f} of the other, bound {BOUND}")
    return int(mean > BOUND)


if __name__ == "__main__":
    sys.exit(main())
