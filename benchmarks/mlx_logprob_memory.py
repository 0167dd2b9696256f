"""Peak memory of response log-probs in MLX, forward and backward: the chunked head or log_softmax over full logits.

    python benchmarks/mlx_logprob_memory.py [--tokens 4096 --vocabulary 16384 --hidden 16]

Both run in this process. Memory is MLX's own peak (mx.get_peak_memory), including parameters and gradients. The hidden
size is small because MLX's products are slow on CPU; it hardly changes the memory. Exits with an error if the chunked
head takes more than --bound of the memory of the full logits.
"""

import argparse
import sys
import time

import mlx.core as mx
from gvpo_mlx import token_logprobs


def full_logits(hidden: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Returns log-probs from full logits, the usual way."""
    logits = hidden @ weight.T
    return mx.take_along_axis(logits, targets[:, None], 1).squeeze(1) - mx.logsumexp(logits, 1)


def measure(variant: str, tokens: int, vocabulary: int, hidden_size: int) -> dict[str, float]:
    """Runs one forward and backward pass. Returns peak bytes, seconds, and two numbers that compare results."""
    keys = mx.random.split(mx.random.key(0), 3)
    hidden = mx.random.normal((tokens, hidden_size), key=keys[0])
    weight = 0.05 * mx.random.normal((vocabulary, hidden_size), key=keys[1])
    targets = mx.random.randint(0, vocabulary, (tokens,), key=keys[2])
    mx.eval(hidden, weight, targets)
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    compute = token_logprobs if variant == "chunked" else full_logits
    value, grads = mx.value_and_grad(lambda h, w: compute(h, w, targets).mean(), (0, 1))(hidden, weight)
    mx.eval(value, grads)
    seconds = time.perf_counter() - start
    norm = sum(float(mx.linalg.norm(g)) for g in grads)
    return {"peak": mx.get_peak_memory(), "seconds": seconds, "mean": float(value), "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--bound", type=float, default=0.125)
    options = parser.parse_args()
    sizes = (options.tokens, options.vocabulary, options.hidden)
    print(f"{sizes[0]:,} tokens, vocabulary {sizes[1]:,}, hidden {sizes[2]:,}, float32, forward + backward")
    results = {}
    for variant in ("chunked", "full logits"):
        results[variant] = measure(variant, *sizes)
        peak, seconds = results[variant]["peak"] / 2**20, results[variant]["seconds"]
        print(f"  {mx.default_device()} {variant:12} {peak:10,.0f} MiB {seconds:8.2f} s", flush=True)
    full, chunked = results["full logits"], results["chunked"]
    for name in ("mean", "norm"):
        if abs(full[name] - chunked[name]) > 1e-3 * abs(full[name]):
            sys.exit(f"results differ: {name} {full[name]} and {chunked[name]}")
    ratio = chunked["peak"] / full["peak"]
    print(f"  ratio {ratio:.3f} (bound {options.bound})")
    if ratio > options.bound:
        sys.exit(f"the chunked head takes {ratio:.3f} of the memory of full logits; expected at most {options.bound}")


if __name__ == "__main__":
    main()
