"""Loads a dataset from the Hugging Face hub through `datasets`, and checks whether the hub answers."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

_PREFIX = re.compile(r"hf://(datasets/)?")
_NAME = re.compile(r"[\w.\-]+/[\w.\-]+")
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

_SECONDS = 10.0  # time limit for the hub to answer


class HubError(ValueError):
    """A dataset of the hub cannot be read."""


def is_hub_name(source: str) -> bool:
    """Whether a text that is not a local path may name a dataset of the hub: `hf://...` or `owner/name`."""
    if source.startswith("hf://"):
        return True
    return bool(_NAME.fullmatch(source)) and not source.endswith((*_FORMATS, ".arrow", ".txt"))


def hub_dataset(source: str, where: str, *, split: str = "", subset: str = "") -> Any:
    """Loads a dataset. Returns all its splits if `split` is empty.

    Args:
      source: `owner/name`, `hf://owner/name`, `hf://datasets/owner/name`, or a file in one of the latter.
      where: name of the source in error messages.
      subset: the dataset's configuration. Empty: its only or default one.
    Raises: HubError: `datasets` is missing, or the dataset cannot be read; the message is one line.
    """
    try:
        from datasets import load_dataset
        from huggingface_hub.errors import HFValidationError
    except ImportError as e:
        raise HubError(f"{where}: a dataset of the hub needs datasets: pip install datasets") from e
    path = _PREFIX.sub("", source).rstrip("/")
    name, file = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    if not _NAME.fullmatch(name):
        raise HubError(f"{where} names no dataset; expected owner/name, such as openai/gsm8k")
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
    except Exception as e:  # datasets, huggingface_hub and their HTTP client may raise any exception
        reason = f"{type(e).__name__}: {e}".strip().partition("\n")[0]
        if unreachable:
            reason = f"it was not read before, and the hub cannot be reached: {unreachable}"
        raise HubError(
            f"{where} is not a file here and cannot be read from the hub as a dataset ({reason:.300}); give a file or a"
            " folder, or check the name, data.subset, data.split and the network"
        ) from e


def unreachable_for(name: str, kind: str, revision: str | None = None) -> str:
    """Sends one request to the hub and returns why it failed; empty if the hub answered, or if HF_HUB_OFFLINE is set.

    The request has a time limit; the hub's own client waits forever.

    Args:
      kind: model or dataset.
    Raises: HFValidationError: `name` is not a valid repository name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_SECONDS)
    except (HfHubHTTPError, OfflineModeIsEnabled):  # `datasets` gets and reports the same error
        return ""
    except HFValidationError:
        raise
    except Exception as e:  # the HTTP client may raise any exception
        return f"{type(e).__name__}: {e}".strip().partition("\n")[0]
    return ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside `with`, `datasets` reads only its cache; otherwise it tries six times, waits 23 s and prints each time."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
