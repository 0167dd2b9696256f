"""A fake of vLLM's server in a process of its own, which draws with a policy of a backend from the folders it gets.

Its backend and model are those of the run's settings.
"""

import json
import queue
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import forks
import numpy as np
from engine_server import Server


class PolicyServer(Server):
    """All work of the policies is done by one thread, the main one: frameworks have streams of a thread."""

    def __init__(self, config: Any, port: int) -> None:
        from gvpo_core.training.policy.load import load_policy

        self.config, self.work = config, queue.Queue[tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]]()
        self._load = load_policy
        super().__init__(port=port)  # what is drawn before weights come is a table's: the run compares it

    def loaded(self, path: str | Path) -> Any:
        """The policy of a folder, without adapters."""
        return self._load(replace(self.config, model=replace(self.config.model, path=str(path), lora_rank=0)))

    def in_main_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function gives, once the main thread has called it."""
        future: Future[Any] = Future()
        self.work.put((function, arguments, future))
        return future.result()

    def serve(self) -> None:
        """Does the work that comes, for ever."""
        while True:
            function, arguments, future = self.work.get()
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

    def answer(self, body: Any) -> Any:
        return self.in_main_thread(super().answer, body)

    def read(self, path: str) -> Any:
        return self.in_main_thread(self.loaded, path)

    def read_adapters(self, path: str) -> Any:
        with tempfile.TemporaryDirectory() as temporary:
            merged = Path(temporary) / "merged"
            shutil.copytree(self.config.model.path, merged)
            merge(merged, Path(path))
            return self.in_main_thread(self.loaded, merged)


def merge(folder: Path, adapters: Path) -> None:
    """Adds adapters in peft's form to the weights of a folder, by NumPy."""
    from safetensors.numpy import load_file, save_file

    settings = json.loads((adapters / "adapter_config.json").read_text())
    tensors, low = load_file(folder / "model.safetensors"), load_file(adapters / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    for name in [name for name in low if ".lora_A" in name]:
        base = name.removeprefix("base_model.model.").replace(".lora_A", "")
        delta = low[name.replace(".lora_A", ".lora_B")].astype(np.float64) @ low[name].astype(np.float64)
        tensors[base] = (tensors[base] + scale * delta).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def start(config: Path, port: int, log: Path, preload: Sequence[str]) -> ForkServerProcess:
    """The server in a process of its own, which answers once it is there."""
    return forks.start(_serve, (str(config), port), log, preload=preload)


def _serve(config: str, port: int) -> None:
    from gvpo_core.training.config.file import read_config

    PolicyServer(read_config(Path(config)), port).serve()
