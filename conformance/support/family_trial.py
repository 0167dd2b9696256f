"""Tries every family of transformers with every backend, and writes docs/models.md.

    python conformance/support/family_trial.py --out .nox/models            # all; what is in the folder is kept
    python conformance/support/family_trial.py --out .nox/models llama      # one of them again
    python conformance/support/family_trial.py --out .nox/models --page     # the page alone, from what is there

Each family, and each backend on it, runs in a separate process, forked from one that has imported everything. A
crash is a result.
"""

import argparse
import datetime
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import families
import family_page
import numpy as np
import trainer_backends

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling, uniforms

SECONDS = 600  # of the clock, for one family with one backend
WITHIN = 2e-3  # nat a response: float32 beside float64
DRAWN_WITHIN = 1e-3  # of the cumulative distribution
NORM_WITHIN = 2e-3  # of the gradient's norm
PROMPTS = [(9, 5, 7), (11, 12, 13, 14, 15, 16, 17, 18), (20,)]
SEEDS = [[1, 2], [3], [4]]
LIMITS = {"within": WITHIN, "drawn": DRAWN_WITHIN, "norm": NORM_WITHIN}


def in_process(call: Callable[[], dict[str, Any]], seconds: int = SECONDS) -> dict[str, Any]:
    """What `call` returns in a forked process, or how it ended there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    found = call()
            except ConfigError as error:
                found = {"state": "refused", "reason": str(error)}
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                found = {"state": "fails", "reason": reason, "place": f"{Path(place.filename).name}:{place.lineno}"}
                found["trace"] = "".join(traceback.format_exception(error))[-4000:]
            path.write_text(json.dumps(found))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if path.is_file():
            return json.loads(path.read_text())
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        return {"state": "fails", "reason": f"takes over {seconds} s" if late else f"the process ends with {status}"}


def try_make(name: str, folder: Path, window: int = families.WINDOW) -> dict[str, Any]:
    """Makes a family's model and scores it by transformers alone."""
    families.make(name, folder, window)
    reference = families.Reference(folder)
    of, coefficients = families.trial_batch()
    logprobs = reference.logprobs(of)
    if not np.isfinite(logprobs).all():
        raise ValueError("transformers' own log-probs are not finite")
    return {
        "state": "made",
        "class": type(reference.model).__name__,
        "logprobs": logprobs.tolist(),
        "norm": reference.gradient_norm(of, coefficients),
    }


def try_backend(backend: str, folder: Path, made: dict[str, Any], lora_rank: int) -> dict[str, Any]:
    """Loads, scores, samples, steps and exports with one backend; the first thing that is not exact is the result."""
    policies = trainer_backends.BACKENDS[backend].policies
    of, coefficients = families.trial_batch()
    settings = {"lora_rank": lora_rank} if lora_rank else {}
    policy = policies.policy(folder, learning_rate=1e-3, **settings)
    found = {"layout": policy.describe().layout}

    apart = float(np.abs(policy.logprobs(of) - np.asarray(made["logprobs"])).max())
    if not apart <= WITHIN:
        return found | {"state": "wrong", "reason": f"log-probs {apart:.3g} nat apart from transformers'"}

    sampled = policy.generate(PROMPTS, SEEDS, Sampling(max_tokens=7))
    reference = families.Reference(folder)
    apart = max(
        reference.drawn_apart(prompt, response.tokens, uniforms([seed], 0, len(response.tokens))[0])
        for prompt, row, seeds in zip(PROMPTS, sampled, SEEDS, strict=True)
        for response, seed in zip(row, seeds, strict=True)
    )
    if not apart <= DRAWN_WITHIN:
        return found | {"state": "wrong", "reason": f"samples {apart:.3g} of the cumulative distribution apart"}

    before = policies.parameters(policy)
    update = policy.update(of, lambda logprobs, rows: coefficients[rows])
    after = policies.parameters(policy)
    if not any((before[name] != after[name]).any() for name in before):
        return found | {"state": "wrong", "reason": "a step changes no parameter"}
    if not lora_rank and not abs(update.gradient_norm / made["norm"] - 1) <= NORM_WITHIN:
        text = f"gradient norm {update.gradient_norm:.5g}, by transformers {made['norm']:.5g}"
        return found | {"state": "wrong", "reason": text}

    stepped = policy.logprobs(of)
    with tempfile.TemporaryDirectory() as out:
        policy.export(Path(out))
        again = families.Reference(Path(out)).logprobs(of)
    apart = float(np.abs(again - stepped).max())
    if not apart <= WITHIN:
        return found | {"state": "wrong", "reason": f"the export scores {apart:.3g} nat apart in transformers"}
    return found | {"state": "exact"}


def trial(name: str, backends: list[str], out: Path) -> None:
    """One family: its results in `out`, those of other backends kept."""
    path = out / f"{name}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as wide:
        found["made"] = made = in_process(lambda: try_make(name, Path(folder)))
        for backend in backends if made["state"] == "made" else ():
            found[backend] = result = both_kinds(backend, Path(folder), made)
            if (
                result["state"] != "exact" and "window" in result["reason"]
            ):  # released windows are longer than most rows
                made_wide = in_process(lambda: try_make(name, Path(wide), 1024))
                again = both_kinds(backend, Path(wide), made_wide) if made_wide["state"] == "made" else result
                if again["state"] == "exact":
                    found[backend] = again | {"window": result["reason"]}
            found[backend]["tried"] = f"on {datetime.date.today()} with {family_page.versions(backend)}"
            _say(name, backend, found[backend])
    if made["state"] != "made":
        print(f"{name:24} not made: {made['reason'][:200]} {made.get('place', '')}", flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def both_kinds(backend: str, folder: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Full fine-tuning, and where it is exact LoRA under "lora"."""
    full = in_process(lambda: try_backend(backend, folder, made, 0))
    if full["state"] == "exact":
        full["lora"] = in_process(lambda: try_backend(backend, folder, made, 2))
    return full


def _say(name: str, backend: str, result: dict[str, Any]) -> None:
    lora = result.get("lora", {"state": "-"})
    said = result.get("window") or result.get("reason") or lora.get("reason") or ""
    print(f"{name:24} {backend:6} {result['state']:8} lora {lora['state']:8} {said[:150]}", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="families; default: all that have no result yet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--backends", default="torch,jax,mlx", help="those to try; default: all that are installed")
    parser.add_argument("--page", action="store_true", help="write docs/models.md and try nothing")
    parser.add_argument("--again", action="store_true", help="all families, whatever results there are")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.page:
        installed = {backend.name for backend in trainer_backends.present()}
        backends = [name for name in given.backends.split(",") if name in installed]
        _import(backends)
        names = given.names or family_page.names()
        for name in names:
            if given.names or given.again or not _known(given.out / f"{name}.json", backends):
                trial(name, backends, given.out)
    family_page.write(given.out, LIMITS)


def _known(path: Path, backends: list[str]) -> bool:
    if not path.is_file():
        return False
    found = json.loads(path.read_text())
    return found["made"]["state"] != "made" or all(backend in found for backend in backends)


def _import(backends: list[str]) -> None:
    """What every process needs, imported once; no thread and no device is started."""
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_tokenizers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if "torch" in backends:
        import gvpo_torch.policy  # noqa: F401
        import peft  # noqa: F401
    if "jax" in backends:  # many programs, each run a few times
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        import gvpo_jax.policy  # noqa: F401
    if "mlx" in backends:
        import mlx.core  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
