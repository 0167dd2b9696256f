"""Settings that are mappings, on the command line: options of rewards, arguments of chat templates and of engines.

`--rewards.NAME.options.KEY VALUE` sets one option, whether or not the file has it; `--rewards.NAME.options KEY VALUE
...` sets options of a reward that has none. `--model.template.KEY VALUE` sets one argument of the chat template.
`--teacher.template.KEY`, `--engine.fields.KEY` and `--engine.options.KEY` do the same for their tables.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gvpo_core.training.config.settings import Config

_ENTRY = re.compile(r"--(model|teacher|engine)\.(template|fields|options)\.([^=]+)")
_NAME = re.compile(r"--rewards\.([\w.\-]+?)\.options(?:\.([^=]+))?")


def with_mapping_option(config: Config, words: list[str]) -> Config | None:
    """Sets one entry of a mapping; returns the settings, or None if the words are another option.

    A value is read as TOML (50, true, [1, 2]), or else as text. A reward's option stays text if the file has text for
    the same key.

    Raises: ValueError: the words are not keys and values.
    """
    head, equals, value = words[0].partition("=")
    entry = _ENTRY.fullmatch(head)
    if entry and hasattr(section := getattr(config, entry[1]), entry[2]):
        values = [*([value] if equals else []), *words[1:]]
        if len(values) != 1:
            raise ValueError(f"{head} expects one value")
        mapping = getattr(section, entry[2])
        mapping = mapping | {_spelled(entry[3], mapping): _typed(values[0])}
        changes: dict[str, Any] = {entry[1]: replace(section, **{entry[2]: mapping})}
        return replace(config, **changes)
    match = _NAME.fullmatch(head)
    name, key = match.groups() if match else ("", None)
    name = _spelled(name, config.rewards)
    if name not in config.rewards:
        return None
    if key is None and config.rewards[name].options:
        raise ValueError(f"{head}: the file sets options of this reward; set each as {head}.KEY VALUE, or in the file")
    words = [*([value] if equals else []), *words[1:]]
    if key is None and (not words or len(words) % 2):
        raise ValueError(f"{head} expects keys and values: {head} KEY VALUE ...")
    if key is not None and len(words) != 1:
        raise ValueError(f"{head} expects one value")
    reward = config.rewards[name]
    options = dict(reward.options)
    for k, v in [(key, words[0])] if key is not None else zip(words[::2], words[1::2], strict=True):
        k = _spelled(k, options)
        options[k] = v if isinstance(options.get(k), str) else _typed(v)
    return replace(config, rewards=config.rewards | {name: replace(reward, options=options)})


def _spelled(name: str, names: Mapping[str, Any]) -> str:
    """Returns the name as the settings spell it: on the command line a dash may replace an underscore."""
    return next((k for k in names if k.replace("-", "_") == name.replace("-", "_")), name)


def _typed(text: str) -> Any:
    text = text.lower() if text in ("True", "False") else text
    try:
        return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text
