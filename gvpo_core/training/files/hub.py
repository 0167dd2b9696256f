"""Rows of a dataset that is named on the Hugging Face hub, through `datasets`; whether the hub answers at all."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

_PREFIX = re.compile(r"hf://(datasets/)?")
_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

_SECONDS = 10.0  # for the hub to answer


class HubError(ValueError):
    """A dataset of the hub that cannot be read."""


def is_hub_name(source: str) -> bool:
    """Whether a text that is no path here may name a dataset of the hub: `hf://...` or `owner/name`."""
    if source.startswith("hf://"):
        return True
    return bool(_NAME.fullmatch(source)) and not source.endswith((*_FORMATS, ".arrow", ".txt"))


def hub_dataset(source: str, where: str, *, split: str = "", subset: str = "") -> Any:
    """A dataset, or all its splits where none is named.

    Args:
      source: `owner/name`, `hf://owner/name`, `hf://datasets/owner/name`, or a file in one of the latter.
      where: for messages.
      subset: the dataset's configuration. Empty: its only or default one.
    Raises: HubError: `datasets` is missing, or the dataset cannot be read, in one line.
    """
    try:
        from datasets import load_dataset
        from huggingface_hub.errors import HFValidationError
    except ImportError as e:
        raise HubError(f"{where}: a dataset of the hub needs datasets: pip install datasets") from e
    path = _PREFIX.sub("", source).rstrip("/")
    name, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    if not _NAME.fullmatch(name):
        raise HubError(f"{where} names no dataset; expected owner/name, as openai/gsm8k")
    kind = next((kind for ending, kind in _FORMATS.items() if file.endswith(ending)), None)
    if file and kind is None:
        raise HubError(f"{where}: expected a file that ends with {', '.join(_FORMATS)}")
    try:
        unreachable = unreachable_for(name, "dataset")
    except HFValidationError as e:
        raise HubError(f"{where}: no such file or folder here, and not a valid name of the hub: {e}") from e
    try:
        with _offline() if unreachable else contextlib.nullcontext():
            if not file:
                return load_dataset(name, subset or None, split=split or None)
            return load_dataset(kind, data_files=f"hf://datasets/{name}/{file}", split="train")
    except Exception as e:  # datasets, huggingface_hub and their HTTP client raise what they like
        reason = f"{type(e).__name__}: {e}".strip().partition("\n")[0]
        if unreachable:
            reason = f"it was not read before, and the hub cannot be reached: {unreachable}"
        raise HubError(
            f"{where} is not a file here and cannot be read from the hub as a dataset ({reason:.300}); give a file or a"
            " folder, or check the name, data.subset, data.split and the network"
        ) from e


def unreachable_for(name: str, kind: str, revision: str | None = None) -> str:
    """Why the hub does not answer one request; empty: it does, or must not be asked (HF_HUB_OFFLINE).

    Its own client waits for an answer without end.

    Args:
      kind: model or dataset.
    Raises: HFValidationError: no repository can have this name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_SECONDS)
    except (HfHubHTTPError, OfflineModeIsEnabled):  # which `datasets` gets too
        return ""
    except HFValidationError:
        raise
    except Exception as e:  # its HTTP client raises what it likes
        return f"{type(e).__name__}: {e}".strip().partition("\n")[0]
    return ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside `with`, `datasets` reads its cache alone. It would ask six times, with waits of 23 s and a line each."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
