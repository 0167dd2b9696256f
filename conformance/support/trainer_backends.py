"""The backends that the trainer tests run over, one entry each: a new backend adds an entry, not tests."""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import forks
import jax_processes
import killing
import numpy as np
import torch_processes
from ports import free_ports

from gvpo_core.training.config.file import read_config


def _safetensors(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of all files; one that lies in several has its rows in their order."""
    from safetensors.numpy import load_file

    parts: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, array in load_file(path).items():
            parts.setdefault(name, []).append(array)
    return {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}


@dataclass(frozen=True)
class Backend:
    """What the tests need to know of a backend beside its name in `run.backend`."""

    name: str
    modules: tuple[str, ...]  # what must be installed
    preload: tuple[str, ...]  # imported once before processes are forked
    ranks: Callable[[Path], list[dict[str, str]]]  # environments of two processes; a folder for files that they name
    shardings: tuple[str, ...] = ("data_parallel",)  # model.sharding settings of two processes
    state: Callable[[Path], dict[str, np.ndarray]] = _safetensors  # checkpoint's policy folder -> its arrays
    suffixes: frozenset[str] = frozenset((".safetensors", ".json"))  # of the files of a checkpoint
    lora_kinds: tuple[str, ...] = ("lora", "dora")  # model.lora_kind settings
    kills: int = 20  # of one run
    decoders: tuple[str, ...] = ("llama", "qwen2", "qwen3")  # tiny models that are sampled; the first is the usual one

    @property
    def policies(self) -> ModuleType:
        """The backend's helper module: `<name>_policies.py` makes tiny policies, reads them and spoils them.

        policy(folder, **settings): of either config section. Of a policy: parameters, dtypes, first_moments, logits,
        sample, fill and spoiled_gradient. Of the backend: global_settings, pick, truncate. Imports the framework.
        """
        return importlib.import_module(f"{self.name}_policies")

    def two_processes(self, config: Path) -> tuple[int, str]:
        """`gvpo train config` in two processes: the worse exit status, and what both printed.

        Raises: AssertionError: the run ended well, but the processes did not train together.
        """
        logs = [config.with_name(f"rank{rank}.log") for rank in range(2)]
        statuses = forks.run_together(
            killing.train, (str(config),), logs, self.ranks(config.parent), preload=self.preload, seconds=600
        )
        status, output = max(abs(-1 if s is None else s) for s in statuses), "\n".join(log.read_text() for log in logs)
        if status == 0:
            described = json.loads((Path(read_config(config).run.folder) / "environment.json").read_text())
            assert described["policy"]["ranks"] == 2, f"the processes trained alone:\n{output}"
        return status, output


def _torch_ranks(folder: Path) -> list[dict[str, str]]:
    """As torchrun starts them; `test_launch` starts torchrun itself."""
    return torch_processes.environments(2)


def _jax_ranks(folder: Path) -> list[dict[str, str]]:
    return jax_processes.environments(2)


def _mlx_ranks(folder: Path) -> list[dict[str, str]]:
    """As mlx.launch starts them over its ring; `test_mlx_ranks` starts mlx.launch itself."""
    hosts, first = folder / "hosts.json", free_ports()
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(2)]))
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"} for rank in range(2)]


def _orbax(folder: Path) -> dict[str, np.ndarray]:
    from gvpo_jax.checkpoint import read_arrays

    return read_arrays(folder)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "torch",
            ("torch", "transformers", "peft", "tyro"),
            torch_processes.PRELOAD,
            _torch_ranks,
            ("data_parallel", "fsdp"),
            decoders=("llama", "mistral-window", "gemma3_text", "gpt_oss", "qwen3_next", "qwen3_moe", "gpt2"),
        ),
        Backend(
            "jax",
            ("jax", "optax", "orbax", "transformers", "tyro"),
            jax_processes.PRELOAD,
            _jax_ranks,
            state=_orbax,
            suffixes=frozenset(("", ".json", ".ocdbt", ".txt")),
            lora_kinds=("lora",),
            kills=10,  # each start traces its programs
            decoders=("llama", "mistral-window"),
        ),
        # MLX starts threads when its layers are imported: nothing of them before the fork.
        Backend(
            "mlx",
            ("mlx", "mlx_lm", "transformers", "tyro"),
            ("mlx.core", "transformers.models.auto.tokenization_auto"),
            _mlx_ranks,
            kills=10,
        ),
    )
}


def present() -> list[Backend]:
    """The backends that GVPO_SUBJECTS asks for, installed or not; where it is not set, those that are installed."""
    asked = [x for x in os.environ.get("GVPO_SUBJECTS", "").split(",") if x]
    if asked:
        return [BACKENDS[name] for name in BACKENDS if name in asked]
    return [b for b in BACKENDS.values() if all(importlib.util.find_spec(module) for module in b.modules)]
