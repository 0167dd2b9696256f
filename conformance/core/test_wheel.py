"""The built wheel, installed alone in an environment outside the repository: what is in it, and what it asks for.

GVPO_DIST names the folder with the built sdist and wheel (`nox -s checks`); without it these tests are skipped.
"""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
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


TAGGED = {
    "GITHUB_SERVER_URL": "https://host.test",
    "GITHUB_REPOSITORY": "owner/gvpo",
    "GITHUB_REF_NAME": "v9.8.7",
    "GITHUB_REF_TYPE": "tag",
}
RELATIVE = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def metadata_of(folder: Path, **variables: str) -> tuple[Message, str]:
    """METADATA of a wheel built here with these variables, and its description."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")} | variables
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        message = message_from_bytes(wheel.read(name))
    return message, message.get_payload(decode=True).decode()


def test_a_release_has_absolute_links(tmp_path):
    message, text = metadata_of(tmp_path, **TAGGED)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert RELATIVE.findall(prose) == []
    assert "](https://host.test/owner/gvpo/raw/v9.8.7/docs/demo.png)" in prose
    assert "](https://host.test/owner/gvpo/blob/v9.8.7/docs/getting_started.md)" in prose
    urls = dict(url.split(", ") for url in message.get_all("Project-URL"))
    assert urls["Source"] == "https://host.test/owner/gvpo" and urls["Issues"] == f"{urls['Source']}/issues"
    assert set(urls) == {"Paper", "Source", "Documentation", "Changelog", "Issues"}


def test_other_builds_leave_readme_unchanged(tmp_path):
    branch = TAGGED | {"GITHUB_REF_NAME": "main", "GITHUB_REF_TYPE": "branch"}
    for i, variables in enumerate(({}, branch)):
        (tmp_path / str(i)).mkdir()
        message, text = metadata_of(tmp_path / str(i), **variables)
        assert text.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
        assert message["Description-Content-Type"] == "text/markdown"
        assert [url.split(",")[0] for url in message.get_all("Project-URL")] == ["Paper"]


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
