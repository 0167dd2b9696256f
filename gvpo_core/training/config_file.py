"""Reads a run's settings from TOML, with every mistake reported at once by field and line, and writes them back."""

import dataclasses
import difflib
import re
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gvpo_core.training.config import Config, ConfigError
from gvpo_core.training.metrics import RESERVED_REWARD_NAMES


def read_config(path: Path) -> Config:
    """The settings in a TOML file; what it leaves out keeps its default.

    Raises: ConfigError: the file is missing or not TOML, or fields are unknown, of a wrong type or out of range;
      every one is listed, with its line and a suggestion.
    """
    config, lines = _read(path)
    check_config(config, path, lines)
    return config


def _read(path: Path) -> tuple[Config, dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read the config {path}: {e}") from e
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from e
    reader = _Reader(path, _line_numbers(text))
    config: Config = reader.build(Config, table, "")
    if reader.errors:
        raise ConfigError("\n".join(reader.errors))
    return config, reader.lines


def check_config(config: Config, path: Path | None = None, lines: dict[str, int] | None = None) -> None:
    """Raises ConfigError listing every value or combination that cannot run."""
    c = config
    wrong: list[tuple[str, str]] = []

    def need(good: bool, name: str, wanted: str) -> None:
        if not good:
            section, _, key = name.partition(".")
            wrong.append((name, f"{name} = {getattr(getattr(c, section), key)!r}; expected {wanted}"))

    for name in (
        "run.steps", "rollout.prompts", "rollout.responses", "rollout.max_tokens", "data.max_prompt_tokens",
        "objective.epochs", "objective.minibatches", "optimizer.micro_batch_tokens", "evaluation.responses",
        "run.keep_checkpoints",
    ):  # fmt: skip
        need(_get(c, name) >= 1, name, "at least 1")
    for name in (
        "run.seed", "run.checkpoint_every", "run.show_every", "model.lora_rank", "model.lora_alpha",
        "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.warmup", "optimizer.max_gradient_norm",
        "optimizer.micro_batch_responses", "optimizer.eps", "evaluation.every", "evaluation.prompts",
        "evaluation.temperature", "objective.beta", "rollout.temperature", "rollout.top_k",
    ):  # fmt: skip
        need(_get(c, name) >= 0, name, ">= 0")
    need(0 < c.rollout.top_p <= 1, "rollout.top_p", "in (0, 1]")
    need(0 <= c.rollout.min_p < 1, "rollout.min_p", "in [0, 1)")
    need(0 < c.objective.clip < 1, "objective.clip", "in (0, 1)")
    need(all(0 <= b < 1 for b in c.optimizer.betas), "optimizer.betas", "two numbers in [0, 1)")
    need(bool(c.data.train), "data.train", "a file of training prompts")
    need(bool(c.model.path) or c.run.backend == "table", "model.path", "a model folder or name")
    need(
        not c.model.trust_remote_code or bool(c.model.revision) or Path(c.model.path).is_dir(),
        "model.trust_remote_code",
        "a model.revision (a commit) beside it, so that the code that was read is the code that runs",
    )
    compares = c.objective.name not in ("sft", "reject_sampling")
    need(c.rollout.responses >= 2 or not compares, "rollout.responses", f"at least 2 for {c.objective.name}")
    if c.objective.name == "dpo":
        need(c.objective.beta > 0, "objective.beta", "> 0 for dpo")
    need(
        c.objective.minibatches <= c.rollout.prompts,
        "objective.minibatches",
        f"at most rollout.prompts = {c.rollout.prompts}",
    )
    if not c.rewards:
        wrong.append(("rewards", "no reward: add a [rewards.NAME] section with function = ..."))
    for name, reward in c.rewards.items():
        if not reward.function:
            wrong.append((f"rewards.{name}", f"rewards.{name}.function is empty; expected a reward function"))
        if name in RESERVED_REWARD_NAMES or not re.fullmatch(r"[\w.\-]+", name):
            wrong.append((f"rewards.{name}", f"a reward cannot be named {name!r}; give it another name"))
        for key, good, wanted in (
            ("timeout", reward.timeout > 0, "> 0"),
            ("workers", reward.workers >= 1, "at least 1"),
            ("memory", reward.memory >= 0, ">= 0"),
            ("max_failures", 0 <= reward.max_failures <= 1, "in [0, 1]"),
        ):
            if not good:
                full = f"rewards.{name}.{key}"
                wrong.append((full, f"{full} = {getattr(reward, key)!r}; expected {wanted}"))
    sampling = None if wrong else c.rollout.sampling
    if sampling and sampling.truncated_support and not c.rollout.allow_truncated_support:
        cut = ", ".join(f"rollout.{x}" for x in sampling.truncated_support)
        wrong.append(
            (
                "rollout." + sampling.truncated_support[0].split(" ")[0],
                f"{cut} gives some responses probability 0, and GVPO's optimum needs them all (Cor. 3.2);"
                " remove it, or set rollout.allow_truncated_support = true",
            )
        )
    if wrong:
        raise ConfigError("\n".join(_where(path, lines or {}, name) + message for name, message in wrong))


def parse_arguments(arguments: list[str]) -> tuple[Path, Config]:
    """`CONFIG --section.key value ...` -> the file's path and its settings with the overrides.

    `--help` explains every field and leaves. Raises: ConfigError: as read_config, and for bad overrides.
    """
    try:
        import tyro
    except ImportError as e:
        raise ConfigError('the command line needs tyro: pip install "gvpo[train]"') from e
    files = [a for a in arguments[:1] if not a.startswith("-")]
    path = Path(files[0]) if files else None
    default, lines = _read(path) if path else (Config(), {})
    known = {f"--{name}" for name in _field_names(default)}
    for argument in arguments[len(files) :]:
        name = argument.split("=")[0].replace("-", "_").replace("__", "--", 1)
        if argument.startswith("--") and name not in known and argument not in ("--help",):
            raise ConfigError(f"unknown option {argument.split('=')[0]}{_suggest(name, known)}")
    config: Config = tyro.cli(
        Config,
        prog="gvpo train CONFIG",
        description="Trains a policy. CONFIG is a TOML file; options override it.",
        default=default,
        args=arguments[len(files) :],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    if path is None:
        raise ConfigError("no config given: gvpo train CONFIG [--section.key value ...]")
    check_config(config, path, lines)
    return path, config


def write_config(config: Config, path: Path) -> None:
    """Writes the resolved settings as TOML that read_config reads back equal."""
    import tomli_w

    path.write_text(tomli_w.dumps(as_table(config)), encoding="utf-8")


def as_table(config: Any) -> dict[str, Any]:
    """The settings as plain TOML values; None is left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    table: dict[str, Any] = plain(dataclasses.asdict(config))
    return table


def differences(old: Config, new: Config) -> list[str]:
    """One line a setting that differs: `section.key: old -> new`."""
    a, b = _flat(as_table(old)), _flat(as_table(new))
    return [f"{k}: {a.get(k, 'unset')!r} -> {b.get(k, 'unset')!r}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _get(config: Config, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _field_names(config: Config) -> list[str]:
    names = []
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if isinstance(value, dict):
            for name, item in value.items():
                names += [f"{section.name}.{name}.{f.name}" for f in dataclasses.fields(item)]
                names += [f"{section.name}.{name}.options.{key}" for key in item.options]
        else:
            names += [f"{section.name}.{f.name}" for f in dataclasses.fields(value)]
    return names


def _suggest(name: str, known: Any) -> str:
    elsewhere = sorted(k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2])
    close = elsewhere or difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _where(path: Path | None, lines: dict[str, int], name: str) -> str:
    if path is None:
        return ""
    while name and name not in lines:
        name = name.rpartition(".")[0]
    return f"{path}:{lines[name]}: " if name else f"{path}: "


def _line_numbers(text: str) -> dict[str, int]:
    """Dotted key -> line, for tables and `key = value` lines; enough to point at a mistake."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            section = re.sub(r"[\s\"']", "", header[1])
            lines.setdefault(section, number)
        elif key := re.match(r"\s*([\w\-.\"']+)\s*=", line):
            name = re.sub(r"[\"']", "", key[1])
            lines.setdefault(f"{section}.{name}" if section else name, number)
    return lines


class _Reader:
    """Builds dataclasses from a TOML table, collecting every error."""

    def __init__(self, path: Path, lines: dict[str, int]) -> None:
        self.path, self.lines = path, lines
        self.errors: list[str] = []

    def error(self, name: str, message: str) -> None:
        self.errors.append(_where(self.path, self.lines, name) + message)

    def build(self, cls: Any, table: Any, prefix: str) -> Any:
        if not isinstance(table, dict):
            self.error(
                prefix.rstrip("."),
                f"{prefix.rstrip('.')} = {table!r}; expected a section [{prefix.rstrip('.')}]",
            )
            return cls()
        hints = get_type_hints(cls)
        values = {}
        for key, value in table.items():
            name = prefix + key
            if key not in hints:
                known = {prefix + k for k in hints} | set(_field_names(Config()))
                self.error(name, f"unknown {'field' if prefix else 'section'} {name}{_suggest(name, known)}")
            else:
                values[key] = self.value(hints[key], value, name)
        return cls(**values)

    def value(self, hint: Any, value: Any, name: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, name + ".")
        if origin in (Union, types.UnionType):  # X | None; TOML has no None
            return self.value(next(a for a in arguments if a is not type(None)), value, name)
        if origin is Literal:
            if value in arguments:
                return value
            close = difflib.get_close_matches(str(value), arguments, n=1)
            hint_text = f"; did you mean {close[0]!r}?" if close else ""
            self.error(name, f"{name} = {value!r}; expected one of {', '.join(map(repr, arguments))}{hint_text}")
            return arguments[0]
        if origin is dict:
            if isinstance(value, dict):
                return {k: self.value(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
            self.error(name, f"{name} = {value!r}; expected a table")
            return {}
        if origin is tuple:
            if isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
                kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
                return tuple(self.value(k, v, name) for k, v in zip(kinds, value, strict=True))
            self.error(name, f"{name} = {value!r}; expected a list of {arguments[0].__name__}")
            return ()
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
            self.error(name, f"{name} = {value!r}; expected {hint.__name__}")
            return hint()
        return value
