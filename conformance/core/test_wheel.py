"""The built wheel, installed alone in an environment outside the repository: what is in it, and what it asks for.

GVPO_DIST names the folder with the built sdist and wheel (`nox -s checks`); without it these tests are skipped.
"""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from places import ROOT

DIST = os.environ.get("GVPO_DIST")
pytestmark = pytest.mark.skipif(DIST is None, reason="no built wheel: nox -s checks")
PACKAGES = [ROOT / "gvpo", ROOT / "gvpo_core"] + [
    path.parent for folder in ("backends", "adapters") for path in ROOT.glob(f"{folder}/gvpo_*/__init__.py")
]


def built(pattern: str) -> Path:
    assert DIST is not None
    (found,) = Path(DIST).glob(pattern)
    return found


@pytest.fixture(scope="module")
def names() -> list[str]:
    with zipfile.ZipFile(built("*.whl")) as wheel:
        return wheel.namelist()


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of a new environment with the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("outside") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", built("*.whl")]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "bin"


def run(installed: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [installed / program, *arguments], capture_output=True, text=True, env=env, cwd=installed.parent
    )


def test_only_gvpo_names(names):
    top = {name.split("/")[0] for name in names}
    info = {name for name in top if name.endswith(".dist-info")}
    assert len(info) == 1
    assert top - info == {package.name for package in PACKAGES}


def test_typed_and_licensed(names):
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_source_file_is_in_it(names):
    sources = {
        str(path.relative_to(package.parent))
        for package in PACKAGES
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources - set(names) == set()


def test_the_sdist_builds_the_same_wheel(names, tmp_path):
    with tarfile.open(built("*.tar.gz")) as sdist:
        sdist.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    (source,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", source]
    subprocess.run(command, check=True, capture_output=True)
    (again,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(again) as wheel:
        assert sorted(wheel.namelist()) == sorted(names)


def test_it_requires_only_numpy_and_array_api_compat(installed):
    listed = run(installed, "python", "-m", "pip", "list", "--format", "freeze").stdout.split()
    assert {line.split("==")[0] for line in listed} - {"pip", "setuptools"} == {"gvpo", "numpy", "array-api-compat"}


def test_the_core_computes(installed):
    code = """
import numpy as np
from gvpo_core import gvpo_weights
zeros = np.zeros(3)
print(gvpo_weights(zeros, zeros, np.asarray([0.0, 1.0, 5.0]), np.asarray([0, 0, 1]), beta=0.1).tolist())
"""
    result = run(installed, "python", "-c", code)
    assert (result.stdout, result.stderr) == ("[-0.5, 0.5, 0.0]\n", "")


def test_the_face_computes_and_knows_the_trainer(installed):
    code = "import gvpo; print(gvpo.gvpo_loss.__name__, gvpo.train.__module__, gvpo.__version__)"
    result = run(installed, "python", "-c", code)
    assert (result.stdout, result.stderr) == ("gvpo_loss gvpo_core.training.loop 0.1.0\n", "")


@pytest.mark.parametrize("module", ["gvpo_core.objective", "gvpo_core.training.loop", "gvpo_core.training.cli"])
def test_modules_import_without_the_extras(installed, module):
    result = run(installed, "python", "-c", f"import {module}")
    assert (result.returncode, result.stderr) == (0, "")


def test_help_needs_no_extra(installed):
    result = run(installed, "gvpo", "--help")
    assert result.returncode == 0
    assert "gvpo train CONFIG" in result.stdout


def test_training_without_the_extra_names_it(installed):
    result = run(installed, "gvpo", "train", "--help")
    assert result.returncode == 2
    assert 'pip install "gvpo[train]"' in result.stderr
    assert "Traceback" not in result.stderr


def test_the_torch_backend_without_torch_names_its_extra(installed):
    result = run(installed, "python", "-c", "import gvpo_torch")
    assert 'pip install "gvpo[torch]"' in result.stderr
