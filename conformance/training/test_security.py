"""No pickle, no code from data, no secrets in what a run writes."""

import json
import re
import shutil
from pathlib import Path

import faults
import pickles
import pytest
import table_run
from banned import banned
from places import ROOT

from gvpo_core.training.run.checkpoint import begin_checkpoint, commit_checkpoint, damage

pytestmark = pytest.mark.core
SOURCES = [
    p
    for folder in ("gvpo_core", "backends", "adapters", "examples", "benchmarks")
    for p in (ROOT / folder).rglob("*.py")
]
# vLLM's IPC transfer takes the handle of a GPU buffer as a pickle. It is written, and nothing is read.
WRITES_A_HANDLE = ROOT / "backends" / "gvpo_torch" / "transfer.py"


def test_nothing_unpickles_or_evaluates():
    assert len(SOURCES) > 30
    for path in SOURCES:
        wrong = banned(path.read_text())
        if path == WRITES_A_HANDLE:
            assert re.findall(r"pickle\.\w+", path.read_text()) == ["pickle.dumps"]
            wrong -= {"pickle"}
        assert not wrong, f"{path.relative_to(ROOT)} uses {', '.join(sorted(wrong))}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "def f():\n    import _pickle",
        "from dill import loads",
        "import cloudpickle",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "from importlib import import_module\nimport_module('pickle')",
        "import importlib as i\ni.import_module('dill.source')",
        "__import__(x)",
        "eval(x)",
        "exec(x)",
        "import builtins\nbuiltins.eval(x)",
        "from os import system\nsystem(x)",
        "import torch\ntorch.load(x)",
        "import torch\ntorch.load(x, weights_only=True)",
        "import torch as t\nt.load(x)",
        "from torch import load",
        "from torch import *\nload(x)",
        "from numpy import *\nload(x)",
        "from torch import load\nload(x)",
        "from torch import load as fetch\nfetch(x)",
        "import torch\nread = torch.load\nread(x)",
        "import torch\nread = [torch.load, len][0]",
        "import torch.serialization\ntorch.serialization.load(x)",
        "from torch import serialization as s\ns.load(x)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
        "from torch.distributed.checkpoint import load\nload(x)",
        "from torch.distributed import checkpoint\ncheckpoint.load(x)",
        "import numpy as np\nnp.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import numpy as np\nnp.load(x, allow_pickle=flag)",
        "from numpy import load\nload(x)",
        "from numpy import load as l\nl(x, allow_pickle=True)",
        "anything.load(x, allow_pickle=True)",
        "import jax.numpy as jnp\njnp.load(x)",
        "import pandas\npandas.read_pickle(x)",
        "frame.to_pickle(x)",
        "import yaml\nyaml.load(x, Loader=y)",
    ],
)
def test_the_check_sees_each(code):
    assert banned(code)


@pytest.mark.parametrize(
    "code",
    [
        "import json\njson.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=False)",
        "from numpy import load\nload(x, allow_pickle=False)",
        "import yaml\nyaml.safe_load(x)",
        "from safetensors.torch import load\nload(x)",
        "import mlx.core as mx\nmx.eval(x)\nmodel.eval()",
        "import re\nre.compile(x)",
        "from gvpo_torch import load\nload(x)",
    ],
)
def test_the_check_leaves_what_is_harmless(code):
    assert not banned(code)


def sealed(folder: Path) -> None:
    """Makes the checksums of a checkpoint those of its files as they are now."""
    step = int(folder.name.rpartition("-")[2])
    partial = begin_checkpoint(folder.parent, step).directory
    (folder / "manifest.json").unlink()
    shutil.rmtree(partial)
    folder.rename(partial)
    commit_checkpoint(folder.parent, step, keep=9)
    assert damage(folder) is None


def test_a_planted_pickle_never_runs(tmp_path):
    """In a checkpoint whose checksums are right: the table's own reader meets it. The backends': test_pickles.py."""
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    config = table_run.make(tmp_path, steps=2)
    assert faults.run(config) == 0
    mark, output = tmp_path / "ran", tmp_path / "output.txt"
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints, tmp_path / "kept")
    for form, content in pickles.forms(mark):
        (checkpoints / "step-00000002" / "policy" / "table.npz").write_bytes(content)
        sealed(checkpoints / "step-00000002")
        output.write_text("")
        assert faults.run(config) == 2, form
        assert "does not hold a table of numbers" in output.read_text() and "Traceback" not in output.read_text(), form
        assert not mark.exists(), form
        shutil.rmtree(checkpoints)
        shutil.copytree(tmp_path / "kept", checkpoints)
    for name in pickles.USUAL:
        (checkpoints / "step-00000002" / "policy" / name).write_bytes(next(pickles.forms(mark))[1])
    sealed(checkpoints / "step-00000002")
    assert faults.run(config) == 0 and not mark.exists()


def test_secrets_of_the_environment_are_in_no_file(tmp_path, monkeypatch):
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    monkeypatch.setenv("HF_TOKEN", "canary-hf-4711")
    monkeypatch.setenv("WANDB_API_KEY", "canary-wandb-4711")
    from gvpo_core.training import cli

    config = table_run.make(tmp_path, steps=2)
    assert cli.main(["train", str(config)]) == 0
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 5
    for path in files:
        assert b"canary" not in path.read_bytes(), path


def test_secrets_on_the_command_line_are_not_kept():
    from gvpo_core.training.config.secrets import hide_command

    command = [
        "gvpo",
        "train",
        "c.toml",
        "--model.path",
        "https://user:canary1@host/x",
        "--api_key=canary2",
        "--token",
        "canary3",
    ]
    kept = json.dumps(hide_command(command))
    assert "canary" not in kept
    assert "c.toml" in kept
