"""No pickle, no code from data, no secrets in what a run writes."""

import ast
import json
import os
from pathlib import Path

import faults
import pytest
import table_run

pytestmark = pytest.mark.core
ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("gvpo_core", "backends", "adapters", "examples") for p in (ROOT / folder).rglob("*.py")]
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "os.system", "np.load", "numpy.load"}


def used(tree: ast.AST) -> set[str]:
    """Modules imported and names called; np.load with allow_pickle=False is not counted."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
            if not safe:
                found.add(name)
    return found


def test_nothing_unpickles_or_evaluates():
    assert len(SOURCES) > 30
    for path in SOURCES:
        wrong = used(ast.parse(path.read_text())) & (MODULES | CALLS)
        assert not wrong, f"{path.relative_to(ROOT)} uses {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("code", ["import pickle", "from dill import loads", "torch.load(x)", "np.load(x)", "eval(x)"])
def test_the_check_sees_each(code):
    assert used(ast.parse(code)) & (MODULES | CALLS)


def test_a_planted_pickle_never_runs(tmp_path):
    pytest.importorskip("tyro", reason="the command line's extra is not installed")
    config = table_run.make(tmp_path, steps=2)
    assert faults.run(config) == 0
    mark = tmp_path / "ran"
    bomb = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()  # what pickle.loads would run
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    for name in ("policy/table.npz", "policy/state.pkl", "policy/training_args.bin", "manifest.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(bomb)
        config.write_text(config.read_text())
        faults.run(config)
        assert not mark.exists(), name
        if not folder.exists():  # set aside as damaged
            (folder.parent / f"damaged-{folder.name}").rename(folder)
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)


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


def test_secrets_on_the_command_line_are_not_kept(tmp_path, monkeypatch):
    from gvpo_core.training.redaction import hide_command

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
    assert os.environ  # the environment itself is never written
