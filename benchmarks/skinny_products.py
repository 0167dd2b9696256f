"""Linear layers with few rows, as in sampling on CPU: x W^T or (W x^T)^T. gvpo_torch uses the second on Intel CPUs.

    nox -s bench -- skinny_products

Measures the layers of SmolLM2-135M and Qwen2.5-0.5B in float32 on 16 to 48 rows, in CPU seconds. The two products are
interleaved, so that other programs on the machine affect both equally. gvpo_torch decides by the CPU's vendor and not
by timing at start: the two products round differently, so if the choice differed between two starts, a resumed run
would not repeat its samples. This benchmark checks the rule instead.

Exit status: 0 if the product used on this CPU costs at most 1.05 of the other one (geometric mean), else 1.
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
    """Returns the linear layers of a decoder layer."""
    sizes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    return [nn.Linear(inputs, outputs, bias=False) for inputs, outputs in sizes]


def seconds(modules: list[nn.Linear], inputs: dict[int, torch.Tensor], transposed: bool) -> float:
    """Returns the CPU seconds of the layers' products."""
    calls = [partial(generate._linear, layer) if transposed else layer for layer in modules]
    start = time.process_time()
    for _ in range(4):
        for layer, call in zip(modules, calls, strict=True):
            call(inputs[layer.in_features])
    return time.process_time() - start


def main() -> int:
    torch.manual_seed(0)
    uses_transposed = generate._wins_transposed()
    print(f"this CPU uses {'(W x^T)^T' if uses_transposed else 'x W^T'}; {torch.get_num_threads()} threads")
    ratios = []
    for name, sizes in LAYERS.items():
        modules = [layer.requires_grad_(False) for layer in layers(*sizes)]
        for rows in ROWS:
            inputs = {n: torch.randn(rows, 1, n) for n in {layer.in_features for layer in modules}}
            plain, transposed = [], []
            for _ in range(ROUNDS):
                plain.append(seconds(modules, inputs, False))
                transposed.append(seconds(modules, inputs, True))
            ratio = statistics.median(transposed) / statistics.median(plain)
            print(f"{name:14} {rows:2} rows: (W x^T)^T costs {ratio:.2f} of x W^T", flush=True)
            ratios.append(ratio if uses_transposed else 1 / ratio)
    mean = statistics.geometric_mean(ratios)
    print(f"the product used here costs {mean:.2f} of the other, bound {BOUND}")
    return int(mean > BOUND)


if __name__ == "__main__":
    sys.exit(main())
