"""examples/quickstart.ipynb runs, cell by cell, and its cells show what they say."""

import ast
import json
from pathlib import Path

import pytest
import tiny_models
import trainer_backends
from places import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# A minute of compilation with JAX.
BACKENDS = [
    pytest.param(backend, marks=pytest.mark.slow if backend.name == "jax" else ())
    for backend in trainer_backends.present()
]


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict) -> object:
    """Runs a cell as a notebook does; the value of its last line where that is an expression."""
    tree = ast.parse(source)
    names["_last"] = None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Assign([ast.Name("_last", ast.Store())], tree.body[-1].value)
        tree.body[-1] = ast.copy_location(last, tree.body[-1])
    exec(compile(ast.fix_missing_locations(tree), NOTEBOOK.name, "exec"), names)
    return names["_last"]


@pytest.mark.core
def test_the_notebook_is_saved_without_output():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(code_cells()) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_notebook_trains_a_tiny_model_and_shows_its_curves(backend, tmp_path, monkeypatch, capfd):
    """Two steps, a tiny model and a backend by name instead of its settings; the rest as it stands."""
    model = tiny_models.write_model("llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    changes = {
        'MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"': f"MODEL = {str(model)!r}",
        "STEPS = 20": "STEPS = 2",
        "steps=STEPS": f'steps=STEPS, backend="{backend.name}"',
    }
    source = "\0".join(code_cells())
    for old, new in changes.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    names: dict = {"__name__": "__main__"}
    values = [run_cell(cell, names) for cell in source.split("\0")]
    assert [1.0] in values  # the reward's own example
    result = names["result"]
    assert any(value is result for value in values)
    assert result.step == 2 and len(result.metrics["reward/mean"]) == 2 and result.held_out is not None
    assert result._repr_html_().count("<svg") >= 2
    assert Path("runs/notebook/report.html").exists()
