"""Keeps secrets out of what a run writes and prints: settings, command lines, logs and tracebacks.

A secret is the value of a setting, option, environment variable or query parameter with a name such as api_key, or a
password in a URL. Every text is searched for it, also in the forms that repr, JSON, HTML, URLs and base64 give it, and
for its beginning, because a text may be cut in the middle of it. Write a reward's option as "$NAME" to read it from
the environment when the run starts; then it is in no file.
"""

import base64
import html
import json
import logging
import os
import re
import traceback
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from gvpo_core.training.config import ConfigError
from gvpo_core.training.terminal.text import printable

HIDDEN = "***"
SHORTEST = 6
"""Length of the shortest value that is searched for: a shorter one would be found in ordinary words."""
_NAMED = re.compile(
    r"((?<!eos_)(?<!bos_)(?<!pad_)(?<!end_)(?<!stop_)(?<!start_)(?<!mask_)(?<!image_)(?<!special_)"
    r"token(?!s|iz|_(?:counts?|ids?|types?|limit|budget|weights?|penalty)\b)"
    r"|secret|passw|passphrase|passcode|(?:api|access|private|account|subscription|auth)[_-]?key|connection[_-]?string"
    r"|credential|authorization|cookie|[_-]pat$"
    r"|(?:^|[_-])(?:jwt|bearer|creds|auth|auth_header|webhook|webhook_url|dsn|otp|csrf)$|^(?-i:pass|pwd)$|(?-i:[a-z](?:Pass|Pwd))$"
    r"|(?<![a-z])(api|access|auth|bearer|refresh|id|hf|github|bot)[_-]tokens$|[_-](pass|pwd)$"
    r"|(?<!answer)(?<!sort)(?<!primary)(?<!foreign)(?<!partition)(?<!prompt)(?<!question)(?<!label)(?<!gold)(?<!target)"
    r"(?<!solution)(?<!response)(?<!column)[_-]key$)",
    re.IGNORECASE,
)
# For environment variables only; a setting max_tokens or label_keys is not a secret.
_VARIABLE = re.compile(r"(?!(?:MAX|MIN|NUM|N)_)[A-Z0-9_]*_(?:TOKENS|KEYS)")
# A password may contain @ and /, although a URL should not: it reaches to the last @ before a host. Digits alone are a
# port. It ends where another URL begins: otherwise a text with many URLs would take quadratic time.
_IN_URL = re.compile(
    r"(?<=://)(?:[^/@:\s'\"]*:(?!\d+(?:[/?#]|$))(?:(?!://)[^\s'\"<>])+(?=@[\w.\-\[\]]+(?::\d+)?(?:[/?#\s'\",;)]|$))"
    r"|[^/@\s'\"]+(?=@))"
)
_IN_QUERY = re.compile(  # in a URL, or in a database's connection string
    r"(?<=[?&#;])([\w.\-]*(?:token|secret|passw|pwd|key|credential|signature|sig|auth)[\w.\-]*=)[^&\s'\"#;]+",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"(?<=\bBearer )(?=\S*\d)[\w.~+/=\-]{8,}|(?<=\bBasic )(?=\S*[\d=])[\w+/=\-]{8,}")
_IN_CONNECTION = re.compile(  # libpq's
    r"(?<=\s)((?:ssl)?(?:password|passwd|pwd)=)(?:'[^'\n]+'|[^\s'\";]+)", re.IGNORECASE
)
_HEADER = re.compile(  # headers as an HTTP client shows them; the scheme stays
    r"(\b(?:proxy-)?(?:authorization|x-api-key|api-key|set-cookie|cookie)['\"]?\s*[:=]\s*b?['\"]?"
    r"(?:(?:bearer|basic|token|apikey|digest)\s+)?)(?!\*|(?:bearer|basic|token|apikey|digest)\s)[^\s'\",;]{6,}(?:;\s?[^\s'\",;]+)*",
    re.IGNORECASE,
)
# Keys of OpenAI, Hugging Face, GitHub, GitLab, Slack, AWS and Google, and JWTs. They match only at the start of a word:
# a match from every hyphen would take quadratic time on a long text.
_ISSUED = re.compile(
    r"(?<![\w\-])(?:sk-(?=[\w\-]*\d)[\w\-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w\-]{16,}|xox[abeoprs]-[\w\-]{10,}|AKIA[0-9A-Z]{16}\b|AIza[\w\-]{30,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]{8,})"
)
_KEY = re.compile(r"(?=.*\d)\S{16,}")  # the value of an option `key`, if it is not the name of a column
_AFTER_SCHEME = re.compile(r"(?i:bearer|basic|token|key)\s+(\S.*)")  # a header's value without its scheme
_FROM_ENVIRONMENT = re.compile(r"\$([A-Za-z_]\w*)")
_FREE_FORM = ("options", "fields", "template")  # settings whose tables have any form
_ESCAPE = re.compile("%[0-9A-F]{2}")
_OF_GO = re.compile("[<>&]")  # JSON encoders such as Go's escape them
_CUT_AT_LEAST = 8  # length of the shortest beginning of a secret that is hidden
_LONG = 12  # length of the shortest secret whose beginning is searched for


def is_secret(name: str) -> bool:
    """Returns whether a setting, option or variable of this name holds a secret; `max_tokens` does not."""
    name = name.rpartition(".")[2]
    return bool(_NAMED.search(name) or _VARIABLE.fullmatch(name))


def _names_secret(name: str, value: str) -> bool:
    """Returns whether an option's value is a secret, by its name. The value of `key` must also look like a key."""
    return is_secret(name) or (
        name.casefold() == "key" and bool(_FROM_ENVIRONMENT.fullmatch(value) or _KEY.fullmatch(value))
    )


def hide(text: str, known: Iterable[str] = ()) -> str:
    """Hides secrets in a text: the `known` ones, passwords in URLs, parameters and headers with the name of a secret,
    and keys and tokens with a recognizable form.

    Call it before the text is cut.
    """
    forms = _all_forms(frozenset(known))
    for form in forms:
        text = text.replace(form, HIDDEN)
    for form in forms:
        text = _without_beginning(text, form)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(HIDDEN, _ISSUED.sub(HIDDEN, text)))
    return _HEADER.sub(rf"\1{HIDDEN}", _IN_CONNECTION.sub(rf"\1{HIDDEN}", _SCHEME.sub(HIDDEN, text)))


@lru_cache(maxsize=64)
def _all_forms(known: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted({form for secret in known for form in _forms(secret)}, key=len, reverse=True))


def _forms(secret: str) -> Iterator[str]:
    """Yields a secret in the forms in which programs write it, and so for each of its lines if it has several."""
    for text in (secret, *(line for line in secret.splitlines() if len(line) >= 16)):
        yield text
        yield repr(text)[1:-1]
        yield json.dumps(text)[1:-1]
        yield json.dumps(text, ensure_ascii=False)[1:-1]
        yield json.dumps(json.dumps(text)[1:-1])[1:-1]  # JSON inside JSON
        yield json.dumps(text)[1:-1].replace("/", "\\/")  # PHP's
        yield _OF_GO.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False)[1:-1])
        yield ascii(text)[1:-1]
        yield html.escape(text)
        yield html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")  # Go's and Jinja's
        yield html.escape(text).replace("&#x27;", "&apos;")  # XML
        for quoted in (urllib.parse.quote(text), urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text)):
            yield quoted
            yield _ESCAPE.sub(lambda match: match[0].lower(), quoted)
            yield urllib.parse.quote(quoted, safe="")  # a URL inside another one
        encoded = text.encode("utf-8", "surrogateescape")
        yield repr(encoded)[2:-1]
        yield encoded.hex()
        yield encoded.hex().upper()
        for before in range(3):  # base64 has one form for each position in a group of three bytes
            complete = (before + len(encoded)) // 3 * 4  # characters that do not depend on what follows the secret
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                code = encode(b"\0" * before + encoded).decode()[-(-before * 8 // 6) : complete]
                if len(code) >= _CUT_AT_LEAST:
                    yield code


def _without_beginning(text: str, secret: str) -> str:
    """Hides the beginning of a secret in a text that was cut in the middle of it."""
    head = _CUT_AT_LEAST
    while head < len(secret) and secret[:head].isalpha():  # a plain word is no secret
        head += 1
    if len(secret) < _LONG or head == len(secret):
        return text
    at = text.find(secret[:head])
    while at >= 0:
        end = at + head
        while end < len(text) and end - at < len(secret) and text[end] == secret[end - at]:
            end += 1
        text = text[:at] + HIDDEN + text[end:]
        at = text.find(secret[:head], at + len(HIDDEN))
    return text


def hide_settings(settings: Any) -> Any:
    """Returns settings as plain values without the secrets of settings and environment; references "$NAME" stay."""
    return _hidden(settings, "", secrets_of(settings))


def _hidden(value: Any, name: str, known: frozenset[str], free: bool = False) -> Any:
    if isinstance(value, Mapping):
        return {key: _hidden(item, named, known, within) for key, item, named, within in _parts(value, name, free)}
    if isinstance(value, list | tuple):
        return [_hidden(item, named, known, within) for _, item, named, within in _parts(value, name, free)]
    if free and _is_secret_number(value, name):
        return HIDDEN
    if not isinstance(value, str) or _FROM_ENVIRONMENT.fullmatch(value):
        return value
    return HIDDEN if _names_secret(name, value) and value else hide(value, known)


def _parts(value: Any, name: str, free: bool) -> Iterator[tuple[Any, Any, str, bool]]:
    """Yields the parts of a table or list called `name`: key, part, the name that decides whether the part is a secret,
    and whether it is within options, which have any form.

    In options, a table with the name of a secret is a secret as a whole. Headers may be pairs, or tables with name and
    value.
    """
    within = free or name in _FREE_FORM
    if not isinstance(value, Mapping):
        named_here = len(value) == 2 and value[0] == name  # a pair, named by its first part
        for i, item in enumerate(value):
            if named_here and not i:
                yield i, item, "", within
                continue
            pair = free and isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)
            yield i, item, item[0] if pair and is_secret(item[0]) else name, within
        return
    label = next((value[k] for k in ("name", "key", "header") if isinstance(value.get(k), str)), "") if free else ""
    for key, item in value.items():
        named = name if free and is_secret(name) else label if key == "value" and is_secret(label) else str(key)
        yield key, item, named, within


def _is_secret_number(value: Any, name: str) -> bool:
    """Returns whether an integer is a password or key, by its name; the id of a token has fewer digits."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    return integer and is_secret(name) and ("token" not in name.casefold() or abs(value) >= 10**7)


def hide_command(command: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Hides secrets in a command line: values of options with the name of a secret, secrets in URLs, and `known` ones.

    After `--rewards.NAME.options`, keys and values follow. There a key with the name of a secret hides the next word,
    as an option does.
    """
    shown_words: list[str] = []
    known, within = list(known), False  # within: after an option that takes keys and values
    for word in command:
        name, equals, value = word.partition("=")
        before = shown_words[-1] if shown_words else ""
        if "=" not in before and (within or before.startswith("-")) and is_secret(before) and not _refers(word):
            word = HIDDEN
        elif equals and (within or name.startswith("-")) and is_secret(name) and not _refers(value):
            word = f"{name}={HIDDEN}"
        within = name.endswith(".options") if word.startswith("-") else within
        shown_words.append(hide(word, known))
    return shown_words


def _refers(value: str) -> bool:
    """Returns whether a value is "$NAME"; the name of the variable is not a secret."""
    return _FROM_ENVIRONMENT.fullmatch(value) is not None


def secrets_of(settings: Any = None, environment: Mapping[str, str] | None = None) -> frozenset[str]:
    """Returns the secrets of settings and of the environment (default: this process's), for use in `hide`."""
    environment = os.environ if environment is None else environment
    values = {value for name, value in environment.items() if _names_secret(name, value)}
    for value in environment.values():  # a proxy's or a database's password
        values |= {user.partition(":")[2] for user in _IN_URL.findall(value)}
    if settings is not None:
        _collect(settings, "", values, environment, False)
    values |= {match[1] for value in values if (match := _AFTER_SCHEME.fullmatch(value))}
    return frozenset(secret for secret in values if len(secret) >= SHORTEST)


def _collect(value: Any, name: str, values: set[str], environment: Mapping[str, str], free: bool) -> None:
    if isinstance(value, Mapping | list | tuple):
        for _, item, named, within in _parts(value, name, free):
            _collect(item, named, values, environment, within)
    elif free and _is_secret_number(value, name):
        values.add(str(value))
    elif isinstance(value, str):
        if _names_secret(name, value):
            reference = _FROM_ENVIRONMENT.fullmatch(value)
            values.add(environment.get(reference[1], "") if reference else value)
        for user in _IN_URL.findall(value):
            values |= {user, user.partition(":")[2]}
        values |= {m[0].partition("=")[2] for m in _IN_QUERY.finditer(value)}


def resolved(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a reward's options with every "$NAME" read from the environment, also within lists and tables.

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
    if HIDDEN in value:
        raise ConfigError(
            f"{where} is a secret and was not saved with the settings: write it as '$NAME', which is"
            " read from the environment variable NAME"
        )
    reference = _FROM_ENVIRONMENT.fullmatch(value)
    if reference and reference[1] not in os.environ:
        raise ConfigError(f"{where} = {value!r}: the environment has no variable {reference[1]}; set it")
    return os.environ[reference[1]] if reference else value


class Hiding(logging.Formatter):
    """Formats log records, tracebacks included, without secrets and terminal control characters."""

    def __init__(self, form: str, known: Iterable[str]) -> None:
        super().__init__(form)
        self.known = frozenset(known)

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return printable(hide(super().format(record), self.known), keep="\n\t")


def traceback_of(error: BaseException, known: Iterable[str]) -> str:
    """Returns the traceback that Python would print, without secrets and terminal control characters."""
    return printable(hide("".join(traceback.format_exception(error)), known), keep="\n\t")
