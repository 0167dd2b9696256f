"""Keeps secrets out of what a run writes and prints: settings, command lines, logs and tracebacks.

What counts as secret: the values of settings, options and environment variables that are named like secrets, passwords
in URLs, and query parameters named like secrets. A reward's option is best written "$NAME": it is then read from the
environment when the run starts, and stands in no file.
"""

import logging
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from gvpo_core.training.config import ConfigError

HIDDEN = "***"
_NAMED = re.compile(
    r"(token(?!s|iz)|secret|passw|api[_-]?key|access[_-]?key|private[_-]?key|credential|authorization)", re.IGNORECASE
)
_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_IN_QUERY = re.compile(
    r"(?<=[?&])([\w.\-]*(?:token|secret|passw|key|credential|signature|sig|auth)[\w.\-]*=)[^&\s'\"#]+", re.IGNORECASE
)
_FROM_ENVIRONMENT = re.compile(r"\$([A-Za-z_]\w*)")
_SHORTEST = 6  # characters of a value that is looked for in text: a shorter one stands in too many words


def is_secret(name: str) -> bool:
    """Whether a setting, option or variable of this name holds a secret; `max_tokens` does not."""
    return bool(_NAMED.search(name.rpartition(".")[2]))


def hide(text: str, known: Iterable[str] = ()) -> str:
    """Text without passwords in URLs, query parameters named like secrets, and the `known` secrets."""
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(HIDDEN, text))


def hide_settings(value: Any, name: str = "") -> Any:
    """Settings as plain values, without their secrets; a reference to the environment stays."""
    if isinstance(value, Mapping):
        return {key: hide_settings(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide_settings(item, name) for item in value]
    if not isinstance(value, str):
        return value
    return HIDDEN if is_secret(name) and value and not _FROM_ENVIRONMENT.fullmatch(value) else hide(value)


def hide_command(command: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """A command line without the values of options named like secrets, secrets in URLs, and the `known` secrets.

    An option may also be a key and a value after `--rewards.NAME.options`: a key named like a secret hides the next
    word, as an option does.
    """
    kept: list[str] = []
    known, within = list(known), False  # within: after an option that takes keys and values
    for word in command:
        name, equals, value = word.partition("=")
        before = kept[-1] if kept else ""
        if "=" not in before and (within or before.startswith("-")) and is_secret(before) and not _refers(word):
            word = HIDDEN
        elif equals and (within or name.startswith("-")) and is_secret(name) and not _refers(value):
            word = f"{name}={HIDDEN}"
        within = name.endswith(".options") if word.startswith("-") else within
        kept.append(hide(word, known))
    return kept


def _refers(value: str) -> bool:
    """Whether a value is "$NAME": the name of the variable is no secret."""
    return _FROM_ENVIRONMENT.fullmatch(value) is not None


def secrets_of(settings: Any = None, environment: Mapping[str, str] | None = None) -> frozenset[str]:
    """The secrets that settings and the environment (default: this process's) hold, to be looked for in text."""
    environment = os.environ if environment is None else environment
    found = {value for name, value in environment.items() if is_secret(name)}
    if settings is not None:
        _collect(settings, "", found, environment)
    return frozenset(secret for secret in found if len(secret) >= _SHORTEST)


def _collect(value: Any, name: str, found: set[str], environment: Mapping[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, str(key), found, environment)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect(item, name, found, environment)
    elif isinstance(value, str):
        if is_secret(name):
            reference = _FROM_ENVIRONMENT.fullmatch(value)
            found.add(environment.get(reference[1], "") if reference else value)
        for user in _IN_URL.findall(value):
            found |= {user, user.rpartition(":")[2]}
        found |= {m[0].partition("=")[2] for m in _IN_QUERY.finditer(value)}


def resolved(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A reward's options with every "$NAME" read from the environment, within lists and tables too.

    Raises: ConfigError: a variable that is not set, or a value that was hidden when the settings were saved.
    """
    return {name: _resolved(value, f"{where}.{name}") for name, value in options.items()}


def _resolved(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return resolved(value, where)
    if isinstance(value, list | tuple):
        return [_resolved(item, where) for item in value]
    if not isinstance(value, str):
        return value
    if value == HIDDEN:
        raise ConfigError(
            f"{where} was left out of the saved settings, being a secret: write it as '$NAME', which is"
            " read from the environment variable NAME"
        )
    reference = _FROM_ENVIRONMENT.fullmatch(value)
    if reference and reference[1] not in os.environ:
        raise ConfigError(f"{where} = {value!r}: the environment has no variable {reference[1]}; set it")
    return os.environ[reference[1]] if reference else value


class Hiding(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def __init__(self, form: str, known: Iterable[str]) -> None:
        super().__init__(form)
        self.known = frozenset(known)

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return hide(super().format(record), self.known)


def traceback_of(error: BaseException, known: Iterable[str]) -> str:
    """The traceback that Python would print, without secrets."""
    return hide("".join(traceback.format_exception(error)), known)
