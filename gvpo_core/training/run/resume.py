"""The command line that resumes a run, with interpreter, module and launcher as far as the process can tell."""

import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from gvpo_core.training.config import Config
from gvpo_core.training.config.secrets import hide_command

_LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "mlx.launch", "mpirun",
              "mpiexec", "srun", "horovodrun", "deepspeed")  # fmt: skip
_AS_BEFORE = "the command that started it"


def resume_command(processes: int, secrets: Iterable[str] = ()) -> str:
    """The command that resumes this process's run, with secrets hidden.

    Args:
      processes: number of processes in the run. With several, this is the launcher's command line if a parent process
        is a known launcher; otherwise it is the command of one process with a note to run it in each.
      secrets: secrets to hide, in addition to those recognised by their form.
    """
    launcher = _launcher() if processes > 1 else []
    if launcher:
        suffix = " (on every machine)" if _machines() > 1 else ""
        return shlex.join(hide_command(without_from_step(launcher)[0], secrets)) + suffix
    command = without_from_step(_own(sys.orig_argv, sys.argv))[0]  # --from-step would go back once more
    as_typed = shlex.join(hide_command(command, secrets)) if command else _AS_BEFORE
    return as_typed if processes == 1 else f"{as_typed} (in each of the {processes} processes)"


def without_from_step(words: Sequence[str]) -> tuple[list[str], str | None]:
    """Returns a command line without `--from-step N`, and N as typed, or None without the option."""
    other_words: list[str] = []
    step: str | None = None
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--from-step", "--from_step"):
            step = value if equals else next(rest, "")
        else:
            other_words.append(word)
    return other_words, step


def in_its_folder(arguments: Sequence[str], config: Config) -> Config:
    """The settings of `gvpo train RUN/config.toml`. If the run folder was moved or copied, run.folder is its new path.

    An option --run.folder takes precedence.

    Args:
      arguments: the arguments after `gvpo train`.
    """
    path = Path(arguments[0]) if arguments else Path()
    folder = path.parent
    has_folder_option = any(word.partition("=")[0] == "--run.folder" for word in arguments)
    is_run_folder = path.name == "config.toml" and (folder / "lock").is_file() and (folder / "checkpoints").is_dir()
    if (
        has_folder_option
        or not is_run_folder
        or folder.resolve() == Path(os.path.expanduser(config.run.folder)).resolve()
    ):
        return config
    return replace(config, run=replace(config.run, folder=str(folder)))


def _own(original: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The command of this process; empty if nobody typed one: in a notebook, a prompt or a worker process.

    Args:
      original: sys.orig_argv, with the interpreter's options and -m or -c.
      arguments: sys.argv.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules or multiprocessing.parent_process() is not None:
        return []
    if not arguments or arguments[0] in ("", "-") or len(original) < 2:
        return []
    program = Path(arguments[0])
    if program.name == "gvpo":  # the installed command: no interpreter needed
        return [program.name, *arguments[1:]]
    if "-c" in original and arguments[0] != "-c":
        return []  # a program that replaced its arguments
    return [sys.executable, *original[1:]]


def _launcher() -> list[str]:
    """The command line of the nearest parent that is a known launcher; empty if there is none or /proc is missing."""
    process = os.getppid()
    for _ in range(4):  # a shell or another program may be in between
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            status = Path(f"/proc/{process}/status").read_bytes().decode(errors="replace")
        except OSError:
            return []
        if starts_processes(words):
            return words
        process = int(status.partition("PPid:")[2].split()[0])
    return []


def starts_processes(words: Sequence[str]) -> bool:
    """Whether a command line runs a known launcher, directly or as a Python script or module."""
    if not words:
        return False
    if Path(words[0]).name in _LAUNCHERS:
        return True
    if not Path(words[0]).name.startswith("python"):
        return False
    names = [Path(word).name for word in words[1:4] if not word.startswith("-")]
    return bool(names) and names[0] in _LAUNCHERS


def _machines() -> int:
    """Number of machines of the run, if the launcher sets it in the environment; else 1."""
    for name in ("GROUP_WORLD_SIZE", "SLURM_NNODES"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1
