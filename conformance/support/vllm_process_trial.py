"""Trains with vLLM in the process as the sampler, and shows that it has the weights of each step.

python conformance/support/vllm_process_trial.py MODEL_FOLDER

Needs vLLM, gvpo and this folder in one environment; engine_trial.py makes it. What is loaded must stay within 1e-3 nat
a token of the trainer at every step, with prompts long enough for the prefix cache; what is loaded in part must be
stopped by name.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_trial import ROWS, STEPS, TOLERANCE, Timed, config_of, gaps, reward

import gvpo
from gvpo_core.training.config import EngineConfig
from gvpo_core.training.samplers import VLLM, SamplerError, in_process

OPTIONS: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": 2**30, "enforce_eager": True}


class Watched(Timed, VLLM):
    """Stays open after a run."""

    def close(self) -> None:
        self.version = None

    def end(self) -> None:
        super().close()


class WithoutTensors:
    """A policy that gives its weights as a folder alone, as those of JAX and MLX do."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        if name == "tensors":
            raise AttributeError(name)
        return getattr(self._policy, name)


def run(config: gvpo.Config, sampler: Any = None, wrap: Callable[[Any], Any] = lambda policy: policy) -> Any:
    return gvpo.train(config, wrap(gvpo.load_policy(config)), train_rows=ROWS, rewards={"e": reward}, sampler=sampler)


def stopped(config: gvpo.Config, engine: Watched, what: str) -> None:
    """The run must be stopped by the gap. Raises: AssertionError: it was not."""
    try:
        run(config, engine)
    except SamplerError as error:
        if "log-probabilities differ" not in str(error):
            raise
        print(f"{what}: {error}")
    else:
        raise AssertionError(f"{what} passed for the policy's weights; gaps {gaps(Path(config.run.folder))}")


@contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def drawn(folder: Path) -> list[Mapping[str, Any]]:
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "response", "logprob") if name in line} for line in lines]


def try_process(model: str) -> None:
    """All that vLLM in the process must show. Raises: AssertionError."""
    tied = json.loads((Path(model) / "config.json").read_text()).get("tie_word_embeddings", False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = config_of(model, folder / "settings")
        rollout = replace(config.rollout, sampler="engine")
        engine = EngineConfig(kind="vllm", gap_tolerance=TOLERANCE, options=OPTIONS)
        assert run(replace(config, rollout=rollout, engine=engine)).step == STEPS
        print(f"by settings: largest gap of each step {[f'{gap:.1e}' for gap in gaps(folder / 'settings')]}")
        opened = Watched(model, gap_tolerance=TOLERANCE, options=OPTIONS)
        run(config_of(model, folder / "adapters", lora_rank=8), opened)
        print(f"adapters: largest gap of each step {[f'{gap:.1e}' for gap in gaps(folder / 'adapters')]}")
        run(config_of(model, folder / "folder"), opened, WithoutTensors)
        print(f"by a folder: largest gap of each step {[f'{gap:.1e}' for gap in gaps(folder / 'folder')]}")
        for steps in (2, STEPS):
            again = config_of(model, folder / "resumed")
            again = replace(again, optimizer=replace(again.optimizer, schedule="constant"))
            whole = replace(again, run=replace(again.run, folder=str(folder / "whole"), steps=STEPS))
            run(replace(again, run=replace(again.run, steps=steps)), opened)
        run(whole, opened)
        assert drawn(folder / "resumed") == drawn(folder / "whole")
        print("a resumed run draws the same responses")
        with replaced(
            opened, "refresh", lambda policy, version: None if opened.version == 0 else VLLM.refresh(opened, policy, 0)
        ):
            stopped(config_of(model, folder / "kept"), opened, "weights of the first step")
        with replaced(opened._llm, "reset_prefix_cache", lambda: True):
            stopped(config_of(model, folder / "cache"), opened, "prefix cache of the step before")
        opened._llm.reset_prefix_cache()
        if tied:
            with replaced(in_process, "pack_heads", lambda model: None):
                stopped(config_of(model, folder / "head"), opened, "old head")
        opened.end()


if __name__ == "__main__":
    try_process(*sys.argv[1:])
