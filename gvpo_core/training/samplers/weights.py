"""Sends a policy's weights to vLLM's server through a folder that both see: adapters, or the whole model.

Each version gets a new folder: vLLM maps files into memory, and one written again would change under it.
"""

import json
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import attempt
from gvpo_core.training.samplers.protocol import SamplerError

Post = Callable[[str, dict[str, Any]], None]  # a path of the server, and the body; raises SamplerError


class WeightFolder:
    """Where the versions of a policy's weights are written, and how the server is told to load them."""

    def __init__(self, folder: Path, *, adapters: bool) -> None:
        """
        Args:
          folder: seen under the same path by every rank and by the server.
          adapters: whether the policy's LoRA adapters are sent, instead of the whole model.
        """
        self.folder, self.adapters = Path(folder), adapters
        self._loaded: list[Path] = []  # newest last

    def send(self, policy: Policy, version: int, model: str, post: Post, in_use: Collection[str] = ()) -> str:
        """Writes the weights and has the server load them; every rank calls.

        Args:
          in_use: names of older versions that responses are still drawn with.
        Returns: the name under which the server then answers.
        Raises: SamplerError: the server did not load them. ConfigError: a model that cannot be sent so.
        """
        start = policy.gather(np.array([time.time_ns() if policy.rank == 0 else 0], dtype=np.int64))
        target = self.folder / f"{model.replace('/', '-')}-{int(start[0])}-{version}"
        export = policy.export_adapters if self.adapters else policy.export
        attempt(policy, lambda: export(target), kind=SamplerError, explain=self._unwritten)
        attempt(policy, lambda: self._load(target, post, in_use), main_only=True, kind=SamplerError)
        self._loaded.append(target)
        return target.name if self.adapters else model

    def _unwritten(self, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        return SamplerError(f"the weights cannot be written to {self.folder}: {error.strerror or error}")

    def _load(self, target: Path, post: Post, in_use: Collection[str]) -> None:
        if self.adapters:
            post("/v1/load_lora_adapter", {"lora_name": target.name, "lora_path": str(target.resolve())})
        else:
            settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
            if settings.get("tie_word_embeddings"):
                raise ConfigError(
                    "the head of the model is its embedding (tie_word_embeddings): vLLM keeps the old head when it"
                    " reloads such a folder. Train adapters and send them (weights = 'adapters')"
                )
            arguments = {"weights_path": str(target.resolve())}
            post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
            post("/reset_prefix_cache", {})
        for old in self._loaded[:-1]:  # the one before stays for requests past their deadline
            if old.name in in_use:
                continue
            if self.adapters:
                with suppress(SamplerError):  # a server that was started again has no older version
                    post("/v1/unload_lora_adapter", {"lora_name": old.name})
            shutil.rmtree(old, ignore_errors=True)
            self._loaded.remove(old)
