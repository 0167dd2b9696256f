"""The command line that resumes a run, as far as a process can know it: interpreter, module, launcher."""

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
    """What to type to resume the run that this process is in, without the secrets in it.

    Args:
      processes: in the whole run. Of several, the launcher's command line is given where a parent process is a known
        launcher; else the command of one process, and that each is to be started as before.
      secrets: to hide, in addition to those recognised by their form.
    """
    launcher = _launcher() if processes > 1 else []
    if launcher:
        on = " (on every machine)" if _machines() > 1 else ""
        return shlex.join(hide_command(without_from_step(launcher)[0], secrets)) + on
    command = without_from_step(_own(sys.orig_argv, sys.argv))[0]  # given again, it would go back again
    as_typed = shlex.join(hide_command(command, secrets)) if command else _AS_BEFORE
    return as_typed if processes == 1 else f"{as_typed} (in each of the {processes} processes)"


def without_from_step(words: Sequence[str]) -> tuple[list[str], str | None]:
    """A command line without `--from-step N`, and N as it was typed; None: it is not there."""
    kept: list[str] = []
    step: str | None = None
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("--from-step", "--from_step"):
            step = value if equals else next(rest, "")
        else:
            kept.append(word)
    return kept, step


def in_its_folder(arguments: Sequence[str], config: Config) -> Config:
    """The settings of `gvpo train RUN/config.toml`: of a run folder that was moved or copied, with the folder's own
    place as run.folder, unless an option names another.

    Args:
      arguments: after `gvpo train`.
    """
    path = Path(arguments[0]) if arguments else Path()
    folder = path.parent
    named = any(word.partition("=")[0] == "--run.folder" for word in arguments)
    saved = path.name == "config.toml" and (folder / "lock").is_file() and (folder / "checkpoints").is_dir()
    if named or not saved or folder.resolve() == Path(os.path.expanduser(config.run.folder)).resolve():
        return config
    return replace(config, run=replace(config.run, folder=str(folder)))


def _own(original: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """This process's own command; empty where it was not typed: a notebook, a prompt, a worker of another program.

    Args:
      original: sys.orig_argv, the interpreter's options and -m or -c with it.
      arguments: sys.argv.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules or multiprocessing.parent_process() is not None:
        return []
    if not arguments or arguments[0] in ("", "-") or len(original) < 2:
        return []
    program = Path(arguments[0])
    if program.name == "gvpo":  # the installed command: its interpreter says nothing more
        return [program.name, *arguments[1:]]
    if "-c" in original and arguments[0] != "-c":
        return []  # a program that replaced its arguments
    return [sys.executable, *original[1:]]


def _launcher() -> list[str]:
    """The command line of the nearest parent that starts processes; empty: none is known, or this system hides it."""
    process = os.getppid()
    for _ in range(4):  # a shell or an agent may be in between
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
    """Whether a command line is that of a known launcher, itself or as a Python script or module."""
    if not words:
        return False
    if Path(words[0]).name in _LAUNCHERS:
        return True
    if not Path(words[0]).name.startswith("python"):
        return False
    names = [Path(word).name for word in words[1:4] if not word.startswith("-")]
    return bool(names) and names[0] in _LAUNCHERS


def _machines() -> int:
    """Machines of the run, where the launcher tells its processes."""
    for name in ("GROUP_WORLD_SIZE", "SLURM_NNODES"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1
