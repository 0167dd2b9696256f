"""The examples learn, and README quotes them and its own commands word for word."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {"numpy": "numpy", "torch": "torch", "jax": "jax", "mlx": "mlx.core"}


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", MODULES)
def test_the_loop_learns(name):
    asked = os.environ.get("GVPO_SUBJECTS", "").split(",")
    if not installed(MODULES[name]) or (asked != [""] and name not in asked):
        assert name not in asked, f"{name} is asked for and not installed"
        pytest.skip(f"{name} is for another environment")
    command = [sys.executable, ROOT / "examples" / f"{name}_loop.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", result.stdout)]
    assert len(rewards) == 3
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.8


@pytest.mark.core
@pytest.mark.parametrize("name", MODULES)
def test_readme_quotes_the_loop(name):
    code = (ROOT / "examples" / f"{name}_loop.py").read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert f"```python\n{code}\n```" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.core
def test_ci_runs_the_test_command_of_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"Run every test:\n\n```\n(.*)\n```", readme)
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.core
def test_links_of_the_documents_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
