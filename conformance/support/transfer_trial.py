"""Trains with a real vLLM server that gets the weights by its weight-transfer interface, and shows that it has them.

python conformance/support/transfer_trial.py MODEL_FOLDER URL NAME tcp|nccl|ipc

Runs in vLLM's environment, with gvpo. The server has the worker of `gvpo_vllm` (tcp) or `transfer_on_cpu` (nccl, ipc).
At every step engine and trainer must be within 2e-5 nat a token, with prompts long enough for the prefix cache.
"""

import itertools
import json
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transfer_on_cpu
from vllm_trial import ROWS, STEPS, Timed, config_of, gaps, reward

import gvpo
from gvpo_core.training.samplers import Engine, SamplerError, channels

TOLERANCE = 2e-5  # nats a token


class Watched(Timed, Engine):
    """Tells seconds and tokens."""


class Stale(Watched):
    """Sends nothing after the first step."""

    def refresh(self, policy: Any, version: int) -> None:
        if version == 0:
            super().refresh(policy, version)


class Breaks:
    """A policy whose tensors end with an error at the given times."""

    def __init__(self, policy: Any, times: int) -> None:
        self._policy, self._times = policy, times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def tensors(self) -> Any:
        self._times -= 1
        if self._times >= 0:
            given = list(itertools.islice(self._policy.tensors(), 4))
            raise_at = channels.Failed("the trainer stops within an update", again=True)
            return itertools.chain(given, raising(raise_at))
        return self._policy.tensors()


def raising(error: Exception) -> Any:
    raise error
    yield


def policy_of(config: gvpo.Config, kind: str) -> Any:
    """Its channel replaces NCCL and CUDA IPC alone."""
    policy = gvpo.load_policy(config)
    ends = {"nccl": transfer_on_cpu.OverGloo, "ipc": transfer_on_cpu.OverMemory}
    if kind in ends:
        policy.weight_channel = lambda name: ends[name]()
    return policy


def trained(config: gvpo.Config, url: str, name: str, transfer: Any, sampler: type = Watched, wrap: Any = None) -> Any:
    engine = sampler(url, name, weights="model", transfer=transfer, gap_tolerance=TOLERANCE, deadline=120, tries=2)
    policy = policy_of(config, transfer)
    policy = wrap(policy) if wrap else policy
    gvpo.train(config, policy, train_rows=ROWS, rewards={"e": reward}, sampler=engine)
    return gaps(Path(config.run.folder), config.rollout.ahead)


def version(url: str) -> str:
    with urllib.request.urlopen(url + "/weight_info") as answer:
        return str(json.load(answer)["weight_version"])


def try_server(model: str, url: str, name: str, transfer: str) -> None:
    """All that a server of this model must show. Raises: AssertionError."""
    channels.PART_BYTES = 2**17  # several parts of this model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for what, rank, ahead in (("all weights", 0, 0), ("merged adapters", 8, 0), ("a step ahead", 0, 1)):
            found = trained(config_of(model, folder / what, lora_rank=rank, ahead=ahead), url, name, transfer)
            assert len(found) == STEPS and version(url).endswith(f"-{STEPS - 1}")
            of = "of each step" if not ahead else "to the policy a step later"
            print(f"{transfer}, {what}: largest gap {of} {[f'{gap:.1e}' for gap in found]}")
        found = trained(config_of(model, folder / "broken"), url, name, transfer, wrap=lambda policy: Breaks(policy, 1))
        print(f"{transfer}, after a broken update: largest gap of each step {[f'{gap:.1e}' for gap in found]}")
        stopped = partial(trained, url=url, name=name, transfer=transfer)
        config = config_of(model, folder / "stopped")
        ends(lambda: stopped(config, wrap=lambda policy: Breaks(policy, 2)), "the trainer stops within an update")
        assert version(url) == "incomplete"
        found = trained(config_of(model, folder / "next"), url, name, transfer)
        print(f"{transfer}, the run after it: largest gap of each step {[f'{gap:.1e}' for gap in found]}")
        ends(lambda: stopped(config_of(model, folder / "stale"), sampler=Stale), "log-probabilities differ")


def ends(run: Callable[[], Any], wanted: str) -> None:
    """The run must be stopped by this error. Raises: AssertionError: it was not."""
    try:
        found = run()
    except SamplerError as error:
        if wanted not in str(error):
            raise
        print(f"stopped: {error}")
    else:
        raise AssertionError(f"not stopped ({wanted}); gaps {found}")


if __name__ == "__main__":
    try_server(*sys.argv[1:])
