"""Folders whose weights must not be read: pickles, integers, weights packed by another program, an adapter beside."""

import json
import shutil
from pathlib import Path

UNSAFE = {
    "pickle": r"has no model\.safetensors and no model\.safetensors\.index\.json",
    "integers": r"up_proj\.weight is I8, and so are 1 weights",
    "packed": r"the weights are quantised \(gptq\), which .* does not read",
    "adapter": r"holds an adapter \(adapter_config\.json\)",
}
"""Kind -> what is said of it."""


def unsafe(kind: str, folder: Path, tmp_path: Path) -> Path:
    """A copy of a model's folder, of one of the kinds of UNSAFE. Needs PyTorch."""
    import torch
    from safetensors.torch import load_file, save_file

    made = tmp_path / kind
    shutil.copytree(folder, made)
    weights = load_file(made / "model.safetensors")
    if kind == "pickle":
        torch.save(weights, made / "pytorch_model.bin")
        (made / "model.safetensors").unlink()
    elif kind == "integers":
        name = next(name for name in weights if name.endswith("up_proj.weight"))
        save_file(weights | {name: (weights[name] * 100).to(torch.int8)}, made / "model.safetensors", {"format": "pt"})
    elif kind == "packed":
        config = json.loads((made / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (made / "config.json").write_text(json.dumps(config))
    else:
        (made / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    return made
