"""gvpo doctor: lists what is installed, which devices exist, what is wrong and how to fix it. Works offline.

Versions are read from package metadata, without an import. The array frameworks are imported in separate processes
with a time limit, because a broken one may hang, crash or exit the interpreter.
"""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from json import dumps, loads
from typing import Any, Literal, NamedTuple

from gvpo_core import __version__
from gvpo_core.training.config.backends import install_line, installable
from gvpo_core.training.terminal.output import say

LIMIT = 15.0  # seconds for all imports together, also from a cold disk

REQUIRED: dict[str, dict[str, str]] = {
    "core": {"numpy": ">=2.0", "array-api-compat": ">=1.12"},
    "train": {"tyro": ">=1.0.17,<2", "tomli-w": ">=1.2,<2", "rich": ">=14"},
    **{backend.name: dict(backend.versions) for backend in installable()},
    "rewards": {"math-verify": ">=0.9,<1"},
}
"""Extra -> distribution -> versions. Must equal pyproject.toml; a test compares them."""
_OPTIONAL = ("wandb", "trackio", "tensorboard")

_PROBES = {
    "torch": """
import json, torch
devices = ["cpu, %d threads" % torch.get_num_threads()]
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    devices.append("cuda:%d %s, %.0f GiB" % (i, p.name, p.total_memory / 2**30))
if torch.backends.mps.is_available():
    devices.append("mps")
print(json.dumps({"devices": devices, "cuda": torch.version.cuda or torch.version.hip}))""",
    "jax": """
import json, jax
print(json.dumps({"devices": ["%s:%d %s" % (d.platform, d.id, d.device_kind) for d in jax.devices()]}))""",
    "mlx": """
import json, mlx.core as mx
print(json.dumps({"devices": [str(mx.default_device())]}))""",
}


class Finding(NamedTuple):
    """One line of the doctor's report."""

    status: Literal["ok", "warning", "wrong"]
    name: str
    detail: str
    fix: str = ""


def doctor(json: bool = False) -> int:
    """Prints what is installed, which devices exist, and how to fix what is wrong.

    Args:
      json: print one JSON object instead of lines: {"status": the worst, "findings": [{status, name, detail, fix}]}.
    Returns: 1 if any finding is "wrong", else 0. Warnings do not count.
    """
    findings = examine()
    worst = next((s for s in ("wrong", "warning") if any(f.status == s for f in findings)), "ok")
    if json:
        say(dumps({"status": worst, "findings": [f._asdict() for f in findings]}, indent=1))
    else:
        for finding in findings:
            say(f"{finding.status:<8} {finding.name:<17} {finding.detail}".rstrip())
            if finding.fix:
                say(f"{'':<8} {'':<17} -> {finding.fix}")
        count = sum(f.status != "ok" for f in findings)
        say("all checks passed" if not count else f"{count} to fix; the worst is: {worst}")
    return int(worst == "wrong")


def examine() -> list[Finding]:
    """All findings, in the order in which they are printed. Broken packages are findings, not exceptions."""
    deadline = time.monotonic() + LIMIT
    installed = {name: _version(name) for name in _PROBES}
    probes = {name: _start(code) for name, code in _PROBES.items() if installed[name]}
    gpu = _start_nvidia_smi()
    findings = [_python(), Finding("ok", "gvpo", __version__), _machine()]
    findings += [f for name, wanted in REQUIRED["core"].items() for f in _package(name, wanted, "", needed=True)]
    nvidia = _finish(gpu, deadline) if gpu else None
    gpus = nvidia[1].strip().splitlines() if nvidia is not None and nvidia[0] == 0 else []
    if gpus:
        findings.append(Finding("ok", "NVIDIA driver", "; ".join(gpus)))
    for name in _PROBES:
        if name in probes:
            findings += _framework(name, _finish(probes[name], deadline), bool(gpus))
        else:
            findings.append(Finding("ok", name, f'not installed; pip install "gvpo[{name}]" adds it'))
    if not probes:
        findings.append(Finding("warning", "backend", "no array framework, so no training", install_line()))
    for name, wanted in REQUIRED["train"].items():
        findings += _package(name, wanted, "train", needed=bool(probes))
    for name, wanted in REQUIRED["rewards"].items():
        findings += _package(name, wanted, "rewards", needed=False)
    for name in _OPTIONAL:
        findings.append(Finding("ok", name, _version(name) or "not installed (a tracker, optional)"))
    return findings


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is in a range like ">=2.13,<3". Compares only the leading numbers: 2.13.0 of 2.13.0+cpu."""
    have = _numbers(version)
    for clause in wanted.split(","):
        operator, bound = re.fullmatch(r"(>=|<)([\d.]+)", clause).groups()  # type: ignore[union-attr]
        limit = _numbers(bound)
        if (have < limit) if operator == ">=" else (have >= limit):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(n) for n in leading[0].split(".")] if leading else [0]
    return tuple(numbers + [0] * (4 - len(numbers)))


def _python() -> Finding:
    return Finding(
        "ok", "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    )


def _machine() -> Finding:
    facts = [f"{os.cpu_count()} CPU cores"]
    with suppress(ValueError, OSError, AttributeError):  # not on every system
        facts.append(f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory")
    return Finding("ok", "machine", ", ".join(facts))


def _package(name: str, wanted: str, extra: str, *, needed: bool) -> list[Finding]:
    version = _version(name)
    fix = f'pip install "{name}{wanted}"'
    if version is None:
        detail = f"not installed; {f'the extra {extra}' if extra else 'gvpo'} needs {wanted}"
        missing: Literal["ok", "warning", "wrong"] = "ok" if not needed else "warning" if extra else "wrong"
        return [Finding(missing, name, detail, fix if needed else "")]
    if not satisfies(version, wanted):
        return [Finding("wrong" if needed else "warning", name, f"{version}; gvpo needs {wanted}", fix)]
    return [Finding("ok", name, version)]


def _framework(name: str, result: tuple[int | None, str, str], gpu: bool) -> list[Finding]:
    (main, *rest) = (_package(n, w, name, needed=True)[0] for n, w in REQUIRED[name].items())
    status, out, errors = result
    reinstall = f'pip install --force-reinstall "{name}{REQUIRED[name][name]}"'
    if main.status != "ok":
        return [main, *rest]
    if status is None:
        detail = f"{main.detail}; its import did not finish in {LIMIT:g} s, so its devices are unknown"
        trace = f'python -X importtime -c "import {name}"'
        fix = f"run this again if the disk was cold; otherwise find where it hangs: {trace}"
        return [Finding("warning", name, detail, fix), *rest]
    try:
        facts = loads(out.strip().rpartition("\n")[2])
        devices = ", ".join(map(str, facts["devices"]))
    except (ValueError, KeyError, TypeError):
        last = errors.strip().rpartition("\n")[2] or f"exited with status {status}"
        return [Finding("wrong", name, f"{main.detail}; its import fails: {last[:300]}", reinstall), *rest]
    if gpu and name == "torch" and not facts.get("cuda"):
        detail = f"{main.detail}; {devices}: a build without CUDA, on a machine with an NVIDIA GPU"
        fix = "install the CUDA build: https://pytorch.org/get-started/locally"
        return [Finding("warning", name, detail, fix), *rest]
    return [Finding("ok", name, f"{main.detail}; {devices}"), *rest]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # not installed, or metadata that cannot be read
        return None


def _start(code: str) -> "subprocess.Popen[str]":
    # -P: do not import a file called torch.py in this folder. No preallocation: JAX would reserve GPU memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return _open([sys.executable, "-P", "-W", "ignore", "-c", code], environment)


def _start_nvidia_smi() -> "subprocess.Popen[str] | None":
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return _open(query, dict(os.environ))
    except OSError:  # no driver
        return None


def _open(command: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, text=True, errors="replace", env=environment, start_new_session=True, **streams
    )  # fmt: skip


def _finish(process: "subprocess.Popen[str]", deadline: float) -> tuple[int | None, str, str]:
    """Returns (exit status, stdout, stderr). At the deadline, kills the process and its children: status None."""
    try:
        out, errors = process.communicate(timeout=max(0.05, deadline - time.monotonic()))
        return process.returncode, out, errors
    except subprocess.TimeoutExpired:
        with suppress(OSError, AttributeError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.2)
        return None, "", ""
