"""Fingerprints of a run's inputs, small enough to keep. With them a later start detects changes of the inputs."""

import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, time
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gvpo_core.objectives import TABLE
from gvpo_core.training.config import Config, ModelConfig, RewardConfig
from gvpo_core.training.config.engine import SAMPLERS
from gvpo_core.training.files.disk import names_in, retried
from gvpo_core.training.rewards.worker.encoding import UnsendableError, encode

_log = logging.getLogger("gvpo")
_WHOLE = 64 * 2**20  # bytes of the largest file that is hashed completely
_IMPORTS = 1000  # most files of a reward's code
_PIECE, _PIECES = 2**20, 16  # of a larger file: pieces of this size, evenly spaced from start to end
_TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece")
_MODEL = ("config.json", "generation_config.json", "table.json")
_BUILTIN = Path(__file__).parent / "rewards" / "worker"
_PACKAGES = {
    "math_verify": ("math-verify", "latex2sympy2-extended", "sympy"),
    "reasoning_gym": ("reasoning-gym",),
    "reward_model": ("torch", "transformers"),
}
INPUTS = ("data", "model", "dtype", "rewards", "objective", "sampler", "environment")
_MACHINE = ("gvpo", "python", "platform", "ranks")


def run_inputs(
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    rewards: Mapping[str, Callable[..., Any]] | None = None,
    beside: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Mapping[str, Any]]:
    """Returns the fingerprints of a run's inputs, for environment.json: name of INPUTS -> name -> fingerprint.

    Args:
      held_out: rows of the evaluation; empty without one.
      rewards: functions passed from Python.
      beside: rows of data.recorded; empty if there are none.
    """
    more = {"evaluation": held_out, "recorded": beside}
    data = {"train": fingerprint(rows)} | {name: fingerprint(rows) for name, rows in more.items() if rows}
    code = reward_fingerprints(config.rewards, rewards)
    paths = {
        "objective": config.objective.name if config.objective.name not in TABLE else "",
        "sampler": config.rollout.sampler if config.rollout.sampler not in SAMPLERS else "",
    }
    functions: dict[str, Mapping[str, Any]] = {
        section: reward_fingerprints({"name": RewardConfig(function=name)}) if name else {}
        for section, name in paths.items()
    }
    env_paths = (config.environment.path, *config.environment.tools)
    functions["environment"] = reward_fingerprints({name: RewardConfig(function=name) for name in env_paths if name})
    model = dict(model_fingerprint(config.model))
    if config.teacher.path:
        teacher = replace(config.model, path=config.teacher.path, revision=config.teacher.revision)
        model |= {f"teacher_{part}": value for part, value in model_fingerprint(teacher).items()}
    return functions | {"data": data, "model": model, "rewards": code}


def fingerprint(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the number of rows, and the SHA-256 of their values in order.

    A file and the same rows passed from Python have the same fingerprint, in any order of the columns. A value that is
    not JSON and cannot be sent to a reward's process counts only by its type.
    """
    digest = hashlib.sha256()
    for row in rows:
        columns = dict(sorted(row.items(), key=lambda item: str(item[0])))
        try:
            text = json.dumps(columns, default=_plain)
        except TypeError:  # a mapping whose keys are not text
            text = json.dumps(_with_text_keys(columns), default=_plain)
        digest.update(text.encode() + b"\n")
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else repr(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """Converts a value for JSON. Leaves out what differs between processes: an object's address, a set's order."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes | date | time | Decimal):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(item, default=_plain) for item in value)
    try:
        return encode(value)
    except UnsendableError:
        return type(value).__qualname__


def model_fingerprint(config: ModelConfig) -> dict[str, dict[str, str]]:
    """Returns "weights" and "tokenizer" -> SHA-256 of the names and contents of the files in `model.path`.

    weights: settings, safetensors files, and code if it is run; tokenizer: its files and chat template. Of a file
    larger than 64 MiB only the size and 16 pieces of 1 MiB count. Empty if the model is neither a folder nor in the
    hub's cache.
    """
    folder = _model_folder(config)
    if folder is None:
        return {}
    endings = (".safetensors", ".safetensors.index.json", *((".py",) if config.trust_remote_code else ()))
    parts: dict[str, list[str]] = {"weights": [], "tokenizer": []}
    try:
        for name in names_in(folder):
            if name.startswith(_TOKENIZER) or name.endswith((".model", ".tiktoken", ".jinja")):
                parts["tokenizer"].append(name)
            elif name in _MODEL or name.endswith(endings):
                parts["weights"].append(name)
        return {part: {"sha256": _of_files(folder / name for name in names)} for part, names in parts.items() if names}
    except OSError as e:
        _log.warning("the model's files cannot be read (%s): a later start cannot detect changes to them", e)
        return {}


def _model_folder(config: ModelConfig) -> Path | None:
    path = Path(os.path.expanduser(config.path))
    if not config.path or path.is_dir():
        return path if config.path else None
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
    except (ImportError, ValueError):
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _of_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{retried(lambda path=path: _of_file(path))}\n".encode())  # type: ignore[misc]
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size <= _WHOLE:
            return hashlib.file_digest(f, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(_PIECES):
            f.seek((size - _PIECE) * i // (_PIECES - 1))
            digest.update(f.read(_PIECE))
        return digest.hexdigest()


def reward_fingerprints(
    rewards: Mapping[str, RewardConfig], functions: Mapping[str, Callable[..., Any]] | None = None
) -> dict[str, dict[str, str]]:
    """Returns reward -> SHA-256 of its code, and of the files and model folders that its options name.

    The code is the reward's file with its imports, or the source of a function passed from Python. Imports count,
    recursively, if they are in the file's folder or in the working directory. Installed packages count only for
    built-in rewards, by their versions. A reward without a known source is omitted.
    """
    hashes = {}
    for name, reward in rewards.items():
        try:
            function = (functions or {}).get(name)
            code = _source(function) if function is not None else _code_of(_file_of(reward.function))
            code += _named_by_options(reward.options) + _versions_of(reward.function if function is None else "")
        except (OSError, TypeError, ValueError, ImportError):
            continue
        hashes[name] = {"sha256": hashlib.sha256(code).hexdigest()}
    return hashes


def _named_by_options(options: Mapping[str, Any]) -> bytes:
    """Hashes the files and model folders that options name; other values are left out. Raises: OSError."""
    digests = b""
    for name, value in sorted(options.items()):
        if not isinstance(value, str) or not 0 < len(value) < 4096 or "\0" in value or name == "cache":
            continue
        path = Path(os.path.expanduser(value))
        if os.path.isfile(path):  # False for a text too long for a name; Path.is_file raises
            digests += f"\n{name} {retried(lambda path=path: _of_file(path))}".encode()  # type: ignore[misc]
        elif os.path.isfile(path / "config.json"):
            digests += f"\n{name} {model_fingerprint(ModelConfig(path=str(path)))}".encode()
    return digests


def _versions_of(function: str) -> bytes:
    """Returns the versions of the packages that compute a built-in reward's scores; empty for other rewards."""
    versions = b""
    for package in _PACKAGES.get(function.partition(":")[0], ()):
        with contextlib.suppress(PackageNotFoundError):
            versions += f"\n{package} {version(package)}".encode()
    return versions


def _code_of(first: Path) -> bytes:
    """Returns the code of a file and of the files that it imports. Raises: OSError: a file cannot be read."""
    codes: dict[Path, bytes] = {}
    waiting, installed = [first.absolute()], {Path(path) for path in sysconfig.get_paths().values()}
    roots = [root for root in (first.absolute().parent, Path.cwd()) if root not in installed]
    while waiting and len(codes) < _IMPORTS:
        path = waiting.pop()
        if path in codes:
            continue
        codes[path] = retried(path.read_bytes)
        waiting += _imported(path, codes[path], roots)
    if len(codes) == 1:
        return codes.popitem()[1]
    digests = sorted(f"{path.name} {hashlib.sha256(code).hexdigest()}" for path, code in codes.items())
    return "\n".join(digests).encode()


def _imported(path: Path, code: bytes, roots: Iterable[Path]) -> Iterator[Path]:
    """Yields the files of the modules that a file imports, if they are in one of the roots or beside the file."""
    for level, name in _import_names(code):
        folder = path.parents[level - 1] if 0 < level <= len(path.parents) else None
        for root in (folder,) if folder else roots:
            place = root.joinpath(*name.split("."))
            files = (place.with_suffix(".py"), place / "__init__.py") if name else (root / "__init__.py",)
            yield from (file for file in files if file.is_file())


@functools.lru_cache(maxsize=_IMPORTS)
def _import_names(code: bytes) -> tuple[tuple[int, str], ...]:
    """Returns (level, dotted name) of each import; a name after `from x import` may be a module, so it counts too."""
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError):
        return ()
    names: list[tuple[int, str]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            ends = ("", *(alias.name for alias in node.names))
            names += [(node.level, ".".join(filter(None, (node.module, end)))) for end in ends]
    return tuple(names)


def _source(function: Callable[..., Any]) -> bytes:
    code = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    return inspect.getsource(code).encode()


def _file_of(spec: str) -> Path:
    """Finds the file of a reward's code without importing it. Raises: OSError, ImportError, ValueError."""
    where, colon, _ = spec.rpartition(":")
    if not colon:
        builtin = _BUILTIN / f"{spec}.py"
        return builtin if spec in ("judge", "reasoning_gym", "reward_model") else _BUILTIN / "builtin.py"
    if where.endswith(".py"):
        return Path(os.path.expanduser(where))
    package, *inner = where.split(".")
    beside = Path(os.getcwd(), *where.split(".")).with_suffix(".py")  # next to the config, where workers also look
    if os.getcwd() not in sys.path and beside.is_file():
        return beside
    module_spec = importlib.util.find_spec(package)
    if module_spec is None or module_spec.origin is None:
        raise ImportError(where)
    if not inner:
        return Path(module_spec.origin)
    path = Path(module_spec.origin).parent.joinpath(*inner)
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the differences between two environments of a run, one line each: (those allowed, those refused).

    Data, model, dtype and the code of the environment must not change. The code of rewards, objective and sampler,
    versions, the machine and the number of ranks may; later steps then differ from those of an uninterrupted run. An
    entry that one of the two lacks is compared only for the data.
    """
    noted: list[str] = []
    refused: list[str] = []
    for section in INPUTS:
        a, b = (dtypes(e) if section == "dtype" else _table(e.get(section)) for e in (old, new))
        for name in dict.fromkeys((*a, *b)):
            both = (name in a and name in b) or (section == "data" and a and b)  # an evaluation may come or go
            if both and a.get(name) != b.get(name):
                line = f"{section}.{name}: {_shown(a.get(name))} -> {_shown(b.get(name))}"
                if section == "dtype":
                    line = f"{name}.dtype: {a[name]} -> {b[name]} (--{name}.dtype {a[name]} continues as before)"
                (noted if section in ("rewards", "objective", "sampler") else refused).append(line)
    a, b = _machine(old), _machine(new)
    noted += [f"{name}: {a[name]} -> {b[name]}" for name in a if name in b and a[name] != b[name]]
    return noted, refused


def dtypes(environment: Mapping[str, Any]) -> dict[str, str]:
    """Returns "model" and "teacher" -> dtype of their products. Runs without that record have the policy's dtype."""
    policy = _table(environment.get("policy")).get("dtype")
    return ({"model": policy} if policy else {}) | _table(environment.get("dtype"))


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    policy = _table(environment.get("policy"))
    facts = {name: environment[name] for name in _MACHINE if name in environment}
    facts |= {name: policy[name] for name in ("device_name",) if name in policy}
    return facts | _table(policy.get("versions"))


def _table(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    value = _table(value)
    rows = f"{value['rows']:,} rows, " if isinstance(value.get("rows"), int) else ""
    return f"{rows}SHA-256 {str(value['sha256'])[:12]}" if "sha256" in value else "none"
