"""No pickle planted in a checkpoint or a model's folder runs, in any backend: its own readers see it, and refuse."""

import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pickles
import pytest
import tiny_models
import trainer_backends
from places import SUPPORT

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)


@pytest.fixture(scope="module")
def policies(backend):
    return backend.policies


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


def refused(mark, said, work) -> None:
    """The work fails, and nothing of a pickle ran."""
    try:
        work()
    except Exception:  # each reader has its own error for a file that is none of its own
        assert not mark.exists(), said
    else:
        raise AssertionError(f"{said} was read")


def test_the_pickles_go_off_where_something_unpickles_them(tmp_path):
    mark = tmp_path / "mark"
    found = dict(pickles.forms(mark))
    readers = {
        "pickle": lambda content: pickle.loads(content),  # noqa: S301
        "npy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
        "npz": lambda content: np.load(io.BytesIO(content), allow_pickle=True)["logits"],
    }
    if importlib.util.find_spec("torch"):
        import torch

        readers["torch"] = lambda content: torch.load(io.BytesIO(content), weights_only=False)
    for name, read in readers.items():
        read(found[name])
        assert mark.exists(), name
        mark.unlink()


@pytest.mark.slow_on("jax")
def test_a_pickle_in_the_place_of_any_file_of_a_checkpoint_does_not_run(backend, model, tmp_path):
    """Past the checksums: `restore` itself reads what was planted."""
    worker = SUPPORT / "pickle_worker.py"
    command = [sys.executable, str(worker), backend.name, str(model), str(tmp_path)]
    path = os.pathsep.join([str(worker.parent), *(p for p in sys.path if p)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "mark").exists()
    assert int(done.stdout.splitlines()[-1].removeprefix("files read: ")) >= 2, "no planted file was read at all"


def test_a_model_of_pickles_is_refused(policies, model, tmp_path):
    mark = tmp_path / "mark"
    for form, content in pickles.forms(mark):
        for name in ("model.safetensors", "pytorch_model.bin"):
            folder = tmp_path / f"{form}-{name}"
            shutil.copytree(model, folder)
            (folder / "model.safetensors").unlink()
            (folder / name).write_bytes(content)
            refused(mark, f"{name} as {form}", lambda folder=folder: policies.policy(folder))
    folder = tmp_path / "beside"
    shutil.copytree(model, folder)
    for name in pickles.USUAL:
        (folder / name).write_bytes(next(pickles.forms(mark))[1])
    refused(mark, "an adapter beside the model", lambda: policies.policy(folder))
    (folder / "adapter_model.bin").unlink()
    policies.policy(folder)
    assert not mark.exists()
