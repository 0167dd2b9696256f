"""Sends a policy's weights to a vLLM or SGLang server through a shared folder: adapters, or the whole model.

Each version gets a new folder: servers map files into memory, so a file must not change after it was loaded.
"""

import inspect
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.ranks import attempt, highest
from gvpo_core.training.samplers.protocol import SamplerError

_log = logging.getLogger("gvpo")
Post = Callable[[str, dict[str, Any]], None]  # a path of the server, and the body; raises SamplerError
Get = Callable[[str], dict[str, Any]]
NAMES = "/weight_info"  # where vLLM reports the name of its weights; a restart clears the name


class Unknown(SamplerError):
    """The server does not have the command."""


@dataclass(frozen=True)
class Commands:
    """The requests that make a server load weights."""

    load: str  # path of the command that loads adapters
    unload: str  # path of the command that unloads them
    model: Callable[[str, str], list[tuple[str, dict[str, Any]]]]  # (folder, version) -> the commands, in order
    name: str = ""  # path of the command that names the server's weights; empty: `model` names them
    by_version: bool = False  # whether answers then name the version
    ties_heads: bool = True  # whether a tied head is updated too


def _reload(folder: str, version: str) -> list[tuple[str, dict[str, Any]]]:
    reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    return [("/collective_rpc", reload), ("/reset_prefix_cache", {})]


def _from_disk(folder: str, version: str) -> list[tuple[str, dict[str, Any]]]:
    body = {"model_path": folder, "weight_version": version, "flush_cache": True}
    return [("/update_weights_from_disk", body)]


VLLM = Commands("/v1/load_lora_adapter", "/v1/unload_lora_adapter", _reload, "/update_weight_version", ties_heads=False)
SGLANG = Commands("/load_lora_adapter", "/unload_lora_adapter", _from_disk, by_version=True)


class WeightFolder:
    """Writes versions of a policy's weights to a folder, and makes the server load them."""

    def __init__(self, folder: Path, *, adapters: bool, commands: Commands = VLLM) -> None:
        """
        Args:
          folder: has the same path on every rank and on the server.
          adapters: whether the policy's LoRA adapters are sent, instead of the whole model.
        """
        self.folder, self.adapters, self.commands = Path(os.path.expanduser(folder)).absolute(), adapters, commands
        self._loaded: list[Path] = []  # newest last
        self.named = ""  # the newest version, if the server reports it at NAMES

    def send(
        self,
        policy: Policy,
        version: int,
        model: str,
        post: Post,
        get: Get,
        *,
        seconds: float,
        in_use: Collection[str] = (),
    ) -> str:
        """Writes the weights and makes the server load them. Every rank calls this.

        Args:
          post, get: send a POST to the server; return the answer to a GET.
          seconds: time limit for a server that is restarted meanwhile to load the weights.
          in_use: names of older versions that responses are still drawn with.
        Returns: the name in later requests or answers: of the adapters, of SGLang's weights, or `model`.
        Raises: SamplerError: the server did not load them. ConfigError: the model cannot be sent in this way.
        """
        start = policy.gather(np.array([time.time_ns() if policy.rank == 0 else 0], dtype=np.int64))
        target = self.folder / f"{model.replace('/', '-')}-{int(start[0])}-{version}"
        export = policy.export_adapters if self.adapters else self._export_of(policy)
        attempt(policy, lambda: export(target), kind=SamplerError, explain=self._unwritten)
        named = attempt(policy, lambda: self._load(target, post, get, seconds), main_only=True, kind=SamplerError)
        self.named = target.name if highest(policy, int(bool(named))) else ""
        attempt(policy, lambda: self._forget(post, in_use), main_only=True, kind=SamplerError)
        self._loaded.append(target)
        return target.name if self.adapters or self.commands.by_version else model

    def _export_of(self, policy: Policy) -> Callable[[Path], None]:
        if self.commands.ties_heads or "own_head" not in inspect.signature(policy.export).parameters:
            return policy.export
        return partial(policy.export, own_head=True)

    def _unwritten(self, error: Exception) -> Exception:
        if not isinstance(error, OSError):
            return error
        return SamplerError(f"the weights cannot be written to {self.folder}: {error.strerror or error}")

    def _load(self, target: Path, post: Post, get: Get, seconds: float) -> bool:
        """Makes the server load the weights. Returns: whether it reports their name from now on."""
        if self.adapters:
            post(self.commands.load, {"lora_name": target.name, "lora_path": str(target.resolve())})
            return False
        settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
        if settings.get("tie_word_embeddings") and not self.commands.ties_heads:
            raise ConfigError(
                "the head of the model is its embedding (tie_word_embeddings): vLLM keeps the old head when it"
                " reloads such a folder, and this policy's export has no own_head (see Policy.export). Train adapters"
                " and send them (weights = 'adapters'), or set transfer"
            )
        until = time.monotonic() + seconds
        while True:
            named = bool(self.commands.name)
            try:  # before loading: if the server restarts while it loads, the name is gone
                if named:
                    post(self.commands.name, {"new_version": target.name})
            except Unknown:
                named = False
            for path, body in self.commands.model(str(target.resolve()), target.name):
                post(path, body)
            name = get(NAMES).get("weight_version") if named else None
            if name in (None, target.name):
                return name is not None
            lost = f"the weights were not loaded: the server has {name!r}; it was restarted, or another run"
            if time.monotonic() > until:
                raise SamplerError(f"{lost} sends to it")
            _log.warning("%s sends to it; they are sent again", lost)

    def _forget(self, post: Post, in_use: Collection[str]) -> None:
        """Removes older versions that are not in use."""
        for old in self._loaded[:-1]:  # the previous one stays, for requests past their deadline
            if old.name in in_use:
                continue
            if self.adapters:
                with suppress(SamplerError):  # a restarted server has no older version
                    post(self.commands.unload, {"lora_name": old.name})
            shutil.rmtree(old, ignore_errors=True)
            self._loaded.remove(old)
