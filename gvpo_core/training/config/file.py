"""Reads a run's settings from TOML, reports all mistakes at once by field and line, and writes the settings back."""

import contextlib
import dataclasses
import difflib
import io
import re
import tomllib
import types
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from gvpo_core.training.config import Config, ConfigError, RewardConfig
from gvpo_core.training.config.check import wrong_values
from gvpo_core.training.config.help_text import for_help, help_registry, printing_help
from gvpo_core.training.config.mappings import with_mapping_option
from gvpo_core.training.config.secrets import HIDDEN, hide, hide_command, hide_settings, is_secret, secrets_of
from gvpo_core.training.config.suggestions import nearest, setting_names, suggest
from gvpo_core.training.files.disk import refuse_special, retried
from gvpo_core.training.terminal.output import refusing_output


def read_config(path: Path) -> Config:
    """Reads the settings of a TOML file; missing settings keep their defaults.

    Raises: ConfigError: the file is missing or not TOML, or fields are unknown, of a wrong type or out of range.
      Every mistake is listed, with its line and a suggestion.
    """
    config, reader = _read(path)
    _refuse(reader.wrong(config))
    return config


def read_saved(path: Path) -> Config:
    """Reads the saved settings of a run folder, for comparison. Secrets were not saved.

    Raises: ConfigError: the file is missing or not TOML.
    """
    return _read(path)[0]


_SAVED = "config.toml"  # in a run folder, and in a folder that `gvpo init` makes


def _read(path: Path) -> "tuple[Config, _Reader]":
    """Returns the settings, with defaults for wrong fields, and the reader, which has the errors."""
    try:
        refuse_special(path)
        text = retried(lambda: path.read_text(encoding="utf-8-sig"))  # editors on Windows may write a BOM
    except OSError as e:
        inside = f"; give the file in it: {path / _SAVED}" if (path / _SAVED).is_file() else ""
        raise ConfigError(f"cannot read the config {path}: {e.strerror or e}{inside}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"cannot read the config {path}: {e}") from e
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from e
    reader = _Reader(path, _line_numbers(text))
    return reader.build(Config, table, ""), reader


def _refuse(messages: list[str]) -> None:
    if messages:
        raise ConfigError("\n".join(messages))


def parse_arguments(
    arguments: list[str], also: Callable[[Config], list[str]] = lambda config: []
) -> tuple[Path, Config]:
    """Turns `CONFIG --section.key value ...` into the file's path and its settings with the overrides.

    `--help` explains every field and exits.

    Args:
      also: returns further mistakes in the settings, reported with the rest.
    Raises: ConfigError: as read_config, and for bad overrides.
    """
    files = [a for a in arguments[:1] if not a.startswith("-")]
    path = Path(files[0]) if files else None
    default, reader = _read(path) if path else (Config(), None)
    options = arguments[len(files) :]
    if {"-h", "--help"} & {*options}:
        rewards = default.rewards or {"NAME": RewardConfig(function="reward.py:reward")}  # help lists their settings
        with printing_help():
            _overridden(_for_help(dataclasses.replace(default, rewards=rewards)), options)
    if path is None or reader is None:
        raise ConfigError("no config given: gvpo train CONFIG [--section.key value ...]")
    config, wrong = _all_overridden(default, options)
    option_names = {option[0].split("=")[0].replace("-", "_").lstrip("_") for option in _split_options(options)}
    wrong += reader.wrong(config, option_names)
    _refuse(wrong + [message for message in also(config) if not any(line.endswith(f": {message}") for line in wrong)])
    return path, config


def _all_overridden(default: Config, options: list[str]) -> tuple[Config, list[str]]:
    """Returns the settings with every valid option applied, and what is wrong with the others."""
    wrong: list[str] = []
    valid: list[list[str]] = []  # each an option with its values
    option_names, secrets = {f"--{name}" for name in setting_names(default)}, secrets_of(as_table(default))
    switches = {f"--{name}" for name, value in _flat(as_table(default)).items() if isinstance(value, bool)}
    for option in _split_options(options):
        name = option[0].split("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in switches:
            option = [re.sub(r"(^|=)(true|false)$", lambda m: m[1] + m[2].capitalize(), word) for word in option]
        try:
            changed = with_mapping_option(default, option)
        except ValueError as e:
            wrong.append(f"options: {e}")
            continue
        if changed is not None:
            default = changed
        elif option[0].startswith("--") and name not in option_names:
            wrong.append(f"unknown option {option[0].split('=')[0]}{_meant(name, option_names, default)}")
        else:
            valid.append(option)
    try:
        return (_overridden(default, [word for option in valid for word in option]) if valid else default), wrong
    except _RefusedError as e:
        combined_error = str(e)
    config, before = default, len(wrong)
    for option in valid:  # option by option, so that each mistake is reported
        try:
            config = _overridden(config, option)
        except _RefusedError as e:
            shown = (
                str(e)
                if hide_command(option, secrets) == option
                else f"{option[0].split('=')[0]} = {HIDDEN} cannot be read"
            )
            wrong.append(f"options: {hide(shown, secrets)}")
    if len(wrong) == before:  # each option is valid alone
        wrong.append(f"options: {hide(combined_error, secrets)}")
    return config, wrong


def _meant(option: str, option_names: Set[str], config: Config) -> str:
    """Suggests what an unknown option may mean: a setting, an option of the command, or one of a misspelt reward."""
    commands = difflib.get_close_matches(option, ["--dry_run", "--from_step"], n=1, cutoff=0.8)
    if commands:
        return f"; did you mean {commands[0].replace('_', '-')}?"
    parts = option.split(".")
    if parts[0] == "--rewards" and len(parts) > 2 and parts[1] not in config.rewards:
        close = difflib.get_close_matches(parts[1], config.rewards, n=1)
        meant = ".".join([parts[0], *close, *parts[2:]])
        if close and meant in option_names:
            return f"; did you mean {meant}?"
        return f"; there is no reward {parts[1]!r}: add [rewards.{parts[1]}] to the file"
    return suggest(option, option_names)


def _split_options(options: list[str]) -> list[list[str]]:
    """Splits the words into options, each with its values."""
    each: list[list[str]] = []
    for word in options:
        if word.startswith("--") or not each:
            each.append([word])
        else:
            each[-1].append(word)
    return each


class _RefusedError(Exception):
    """Options that do not fit the settings' types; the message says why."""


def _overridden(default: Config, options: list[str]) -> Config:
    """Returns the settings with the options applied; `--help` prints and exits. Raises: _RefusedError."""
    try:
        import tyro
    except ImportError as e:
        raise ConfigError('command-line options need tyro: pip install "gvpo[train]"') from e
    printed = io.StringIO()  # tyro prints an error as a box, which may show the settings' values
    try:
        with refusing_output(), contextlib.redirect_stderr(printed):
            config: Config = tyro.cli(
                Config,
                prog="gvpo train CONFIG",
                description="Trains a policy. CONFIG is a TOML file; options override it.",
                default=default,
                args=options,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
                registry=help_registry(),
            )
    except SystemExit as e:
        if not e.code:
            raise
        reason = _without_box(printed.getvalue()) or " ".join(options)
        if "Unrecognized options" in reason:  # not values either: Hydra's key=value, or one dash
            reason += "; an option begins with two dashes, as --run.steps 5"
        if choice := re.search(r"invalid choice '(.*?)' for argument .*Expected one of \((.*)\)", reason):
            reason = reason.rstrip(".") + nearest(choice[1], re.findall(r"'([^']+)'", choice[2]))
        raise _RefusedError(reason) from e
    return config


def _without_box(text: str) -> str:
    """Returns the words of an error in a box: those between its first two horizontal lines, which may be ASCII."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    rules = [number for number, line in enumerate(lines) if re.search("─{3}|-{3}", line)]
    between = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    return " ".join(word for line in between for word in line.strip("│| ").split())


def _for_help(config: Config) -> Config:
    """Returns the settings for help: without secrets and terminal commands, and with one character per column."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {for_help(str(key)): shown(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shown(item) for item in value]
        return for_help(value) if isinstance(value, str) else value

    return cast(Config, _Reader(Path(), {}).build(Config, shown(hide_settings(as_table(config))), ""))


def write_config(config: Config, path: Path) -> None:
    """Writes all settings as TOML, which read_config reads back unchanged. Secrets are left out."""
    path.write_bytes(config_text(config).encode("utf-8", "backslashreplace"))


def config_text(config: Config) -> str:
    """Returns the text that `write_config` writes."""
    import tomli_w

    return tomli_w.dumps(hide_settings(as_table(config)))


def as_table(config: Any) -> dict[str, Any]:
    """Returns the settings as plain TOML values; None is left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    table: dict[str, Any] = plain(dataclasses.asdict(config))
    return table


def differences(old: Config, new: Config) -> list[str]:
    """Returns one line per setting that differs: `section.key: old -> new`. Secrets are not saved, so not compared."""
    a, b = (_flat(hide_settings(as_table(config))) for config in (old, new))
    names = [k for k in sorted({*a, *b}) if a.get(k) != b.get(k) and HIDDEN not in (a.get(k), b.get(k))]
    return [f"{k}: {a.get(k, 'unset')!r} -> {b.get(k, 'unset')!r}" for k in names]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _line_numbers(text: str) -> dict[str, int]:
    """Returns dotted key -> line, for tables and `key = value` lines; enough to point at a mistake."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            section = re.sub(r"[\s\"']", "", header[1])
            lines.setdefault(section, number)
        elif key := re.match(r"\s*([\w\-.\"']+)\s*=", line):
            name = re.sub(r"[\"']", "", key[1])
            lines.setdefault(f"{section}.{name}" if section else name, number)
    return lines


class _Reader:
    """Builds dataclasses from a TOML table and collects every error; a wrong field keeps its default."""

    def __init__(self, path: Path, lines: dict[str, int]) -> None:
        self.path, self.lines = path, lines
        self.errors: list[tuple[str, str]] = []  # field, message

    def error(self, name: str, message: str) -> None:
        self.errors.append((name, message))

    def wrong(self, config: Config, option_names: Set[str] = frozenset()) -> list[str]:
        """Returns every mistake in the file and in the settings read from it, by line.

        Args:
          option_names: settings given on the command line; their mistakes are reported as options, not by line.
        """
        failed = {name for name, _ in self.errors}
        values = [(name, text) for name, text in wrong_values(config) if not _covered(name, failed)]
        # If an option is part of a wrong combination, the mistake is the option's, whichever setting is reported.
        options = [
            m
            for name, m in values
            if name in option_names or any(re.search(rf"\b{re.escape(option)}\b", m) for option in option_names)
        ]
        messages = [(self._line(name), message) for name, message in self.errors]
        messages += [(self._line(name), message) for name, message in values if message not in options]
        messages.sort(key=lambda pair: pair[0] or len(self.lines) + 10**6)
        shown = [f"{self.path}:{line}: {message}" if line else f"{self.path}: {message}" for line, message in messages]
        return shown + [f"options: {message}" for message in options]

    def _line(self, name: str) -> int:
        while name and name not in self.lines:
            name = name.rpartition(".")[0]
        return self.lines.get(name, 0)

    def build(self, cls: Any, table: Any, prefix: str) -> Any:
        if not isinstance(table, dict):
            section = prefix.rstrip(".")
            self.error(section, f"{section} = {table!r}; expected a section [{section}]")
            return cls()
        hints = get_type_hints(cls)
        values = {}
        for key, value in table.items():
            name = prefix + key
            if key not in hints:
                known_names = {prefix + k for k in hints} | set(setting_names(Config()))
                self.error(name, f"unknown {'field' if prefix else 'section'} {name}{suggest(name, known_names)}")
                continue
            before = len(self.errors)
            read = self.value(hints[key], value, name)
            if len(self.errors) == before or isinstance(read, dict) or dataclasses.is_dataclass(read):
                values[key] = read
        return cls(**values)

    def value(self, hint: Any, value: Any, name: str) -> Any:
        """Converts a value to its type. If it does not fit, records an error and returns None."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint):
            return self.build(hint, value, name + ".")
        if origin in (Union, types.UnionType):  # X | None; TOML has no None
            return self.value(next(a for a in arguments if a is not type(None)), value, name)
        shown = repr(HIDDEN if is_secret(name) else value)
        if origin is Literal:
            if value in arguments:
                return value
            choices = ", ".join(map(repr, arguments))
            self.error(name, f"{name} = {shown}; expected one of {choices}{nearest(str(value), arguments)}")
        elif origin is dict:
            if isinstance(value, dict):
                read = {k: self.value(arguments[1], v, f"{name}.{k}") for k, v in value.items()}
                return {k: v for k, v in read.items() if v is not None}
            self.error(name, f"{name} = {shown}; expected a table")
        elif origin is tuple:
            if isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
                kinds = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
                return tuple(self.value(k, v, name) for k, v in zip(kinds, value, strict=True))
            self.error(name, f"{name} = {shown}; expected a list of {arguments[0].__name__}")
        elif hint is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                self.error(name, f"{name} = {shown}; expected a number within 1e308")
        elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
        else:
            self.error(name, f"{name} = {shown}; expected {hint.__name__}")
        return None


def _covered(name: str, failed: set[str]) -> bool:
    """Returns whether an error of this field, or of a part of it, is already listed."""
    return any(k == name or k.startswith(f"{name}.") or name.startswith(f"{k}.") for k in failed)
