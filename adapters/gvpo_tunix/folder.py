"""The weight files of a model's folder; Tunix reads more of them than transformers."""

import json
from pathlib import Path

from gvpo_core.hosts import SettingsError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def check_files(model_path: str | Path) -> None:
    """Compares the *.safetensors of the folder, all of which Tunix takes weights from, with those of the model.

    Raises: SettingsError: there are others, whose tensors would go into the model where their names fit.
    """
    folder = Path(model_path)
    files = {path.name for path in folder.glob("*.safetensors")}
    if _WHOLE in files:
        source, named = _WHOLE, {_WHOLE}
    elif (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        source, named = f"what {_INDEX} names", set(index["weight_map"].values())
    else:  # nothing says which are the model's
        return
    if stray := sorted(files - named):
        raise SettingsError(
            f"{folder} has {', '.join(stray)} beside {source}: Tunix reads all *.safetensors of a folder, so the actor"
            " may have weights of something else; move what is not the model elsewhere and load it again"
        )
