"""The backends that the trainer tests run over, one entry each: a new backend adds an entry, not tests."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from places import SUPPORT


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
    preload: tuple[str, ...]  # imported once before processes are forked to be killed
    two_processes: Callable[[Path], tuple[int, str]] | None  # trains by a config; exit status and output
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


def _torch_processes(config: Path) -> tuple[int, str]:
    """Forked, with torchrun's variables; torchrun itself is in `test_launch`."""
    import torch_processes

    return torch_processes.train(2, config)


def _jax_processes(config: Path) -> tuple[int, str]:
    return _ended([sys.executable, str(SUPPORT / "jax_processes.py"), "2", sys.executable], config)


def _mlx_launch(config: Path) -> tuple[int, str]:
    path = os.pathsep.join(path for path in sys.path if path)
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    return _ended([*launch, "--env", f"PYTHONPATH={path}", "--", sys.executable], config)


def _ended(launch: list[str], config: Path) -> tuple[int, str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "gvpo_core.training.cli", "train", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    return done.returncode, done.stdout + done.stderr


def _orbax(folder: Path) -> dict[str, np.ndarray]:
    from gvpo_jax.checkpoint import read_arrays

    return read_arrays(folder)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "torch",
            ("torch", "transformers", "peft", "tyro"),
            ("gvpo_torch.policy", "peft", "transformers.models.llama.modeling_llama"),
            _torch_processes,
            ("data_parallel", "fsdp"),
            decoders=("llama", "mistral-window", "gemma3_text", "gpt_oss", "qwen3_next", "qwen3_moe", "gpt2"),
        ),
        Backend(
            "jax",
            ("jax", "optax", "orbax", "transformers", "tyro"),
            ("gvpo_jax.policy", "gvpo_jax.checkpoint", "transformers.models.auto.tokenization_auto"),
            _jax_processes,
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
            ("mlx.core", "transformers.models.auto.tokenization_auto", "gvpo_core.training.loop"),
            _mlx_launch,
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
