"""Peak memory of response log-probs, forward and backward: the tiled head compared with log_softmax over full logits.

    python benchmarks/logprob_memory.py [--tokens 4096 --vocabulary 151936 --hidden 1024]

Each variant runs in a separate process. On CPU, memory is the process's peak resident size, including the interpreter
and PyTorch; on CUDA it is the allocator's peak. Exits with an error if the tiled head takes more than --bound of the
memory of the full logits.
"""

import argparse
import json
import subprocess
import sys
import time


def measure(variant: str, tokens: int, vocabulary: int, hidden_size: int, device: str) -> dict[str, float]:
    """Runs one forward and backward pass. Returns peak bytes, seconds, and two numbers that compare results."""
    import torch
    from gvpo_torch import token_logprobs

    from gvpo_core.training.policy.memory import peak_memory

    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device=device).requires_grad_()
    weight = torch.empty(vocabulary, hidden_size, device=device).normal_(0, 0.05, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    start = time.perf_counter()
    if variant == "tiled":
        logprobs = token_logprobs(hidden, weight, targets)
    else:
        logprobs = (hidden @ weight.t()).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    logprobs.sum().backward()
    mean, norm = float(logprobs.mean()), float(hidden.grad.norm() + weight.grad.norm())
    seconds = time.perf_counter() - start
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = peak_memory()
    return {"peak": peak, "seconds": seconds, "mean": mean, "norm": norm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--bound", type=float, default=0.2)
    parser.add_argument("--measure", nargs=2, metavar=("VARIANT", "DEVICE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.tokens, options.vocabulary, options.hidden)
    if options.measure:
        print(json.dumps(measure(options.measure[0], *sizes, options.measure[1])))
        return
    import torch

    print(f"{sizes[0]:,} tokens, vocabulary {sizes[1]:,}, hidden {sizes[2]:,}, float32, forward + backward")
    worst = 0.0
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        results = {}
        for variant in ("full logits", "tiled"):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", variant, device]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{variant} on {device} failed (status {result.returncode}):\n{result.stderr[-2000:]}")
            results[variant] = json.loads(result.stdout)
            peak, seconds = results[variant]["peak"] / 2**20, results[variant]["seconds"]
            print(f"  {device:5} {variant:12} {peak:10,.0f} MiB {seconds:8.2f} s", flush=True)
        full, tiled = results["full logits"], results["tiled"]
        for name in ("mean", "norm"):
            if abs(full[name] - tiled[name]) > 1e-3 * abs(full[name]):
                sys.exit(f"results differ: {name} {full[name]} and {tiled[name]}")
        ratio = tiled["peak"] / full["peak"]
        worst = max(worst, ratio)
        print(f"  {device:5} ratio {ratio:.3f} (bound {options.bound})")
    if worst > options.bound:
        sys.exit(f"the tiled head takes {worst:.3f} of the memory of full logits; expected at most {options.bound}")


if __name__ == "__main__":
    main()
