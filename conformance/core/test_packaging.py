"""Files about the project beside its code agree with the code: versions, paths, packages."""

import re
import tomllib
from itertools import chain

import lower_ends
import pytest
from places import ROOT

import gvpo_core

pytestmark = pytest.mark.core
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheel_has_every_package() -> None:
    listed = set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    here = {str(path.parent.relative_to(ROOT)) for path in ROOT.glob("gvpo*/__init__.py")}
    here |= {
        str(path.parent.relative_to(ROOT))
        for folder in ("backends", "adapters")
        for path in ROOT.glob(f"{folder}/gvpo_*/__init__.py")
    }
    assert listed == here
    assert all((ROOT / package / "py.typed").is_file() for package in listed)


def test_the_citation_has_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [gvpo_core.__version__]


def test_every_file_that_the_image_copies_exists() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert "gvpo" in names
    assert [name for name in names if not (ROOT / name).exists()] == []
    read = {"README.md", "hatch_build.py", "pyproject.toml", *PYPROJECT["project"]["license-files"]}
    assert read <= set(names), "the build reads them"


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_every_path_extra_and_session_of_a_workflow_exists(path) -> None:
    text = path.read_text(encoding="utf-8")
    sessions = re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"nox -s (\w+)", text)) <= set(sessions)
    assert [name for name in re.findall(r"\bconformance/\w+", text) if not (ROOT / name).is_dir()] == []
    extras = {
        extra for listed in re.findall(r"(?:\.\[|extras: \")([\w,-]+)[\]\"]", text) for extra in listed.split(",")
    }
    assert extras <= set(PYPROJECT["project"]["optional-dependencies"])


def test_every_session_outside_the_default_runs_weekly() -> None:
    """By name and parameter: a misspelt one would fail only after a week."""
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    weekly = (ROOT / ".github/workflows/newest.yml").read_text(encoding="utf-8")
    named = re.findall(r"^ {10}- (\w+)(?:\((\w+)\))?$", weekly, re.MULTILINE)
    assert {"slow", "releases", "verl", "tunix"} <= {name for name, _ in named}
    assert {f"{name}({of})" for name, of in named if of} >= {
        "outside(verifiers)",
        "outside(openenv)",
        "outside(gymnasium)",
        "engines(vllm)",
    }
    assert all(re.search(rf"^def {name}\(session", noxfile, re.MULTILINE) for name, _ in named)
    assert all(f'"{of}"' in noxfile for _, of in named if of)


def test_the_tested_pythons_are_the_ones_named() -> None:
    matrix = re.search(r"python: \[(.*)\]", (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert matrix is not None
    tested = set(re.findall(r"3\.\d+", matrix[1]))
    named = {line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert named <= tested
    assert PYPROJECT["project"]["requires-python"] == f">={min(tested, key=lambda v: int(v[2:]))}"


def test_nox_lowest_installs_the_lower_end_of_every_range() -> None:
    ends = lower_ends.ranges()
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    listed = [*PYPROJECT["project"]["dependencies"], *chain.from_iterable(extras)]
    with_range = {re.split(r"[\[><=!~]", need)[0] for need in listed if re.search(r"[><=!~]", need.partition(";")[0])}
    assert set(ends) == with_range
    assert ends["torch"] == "2.13" and ends["mlx"] == "0.32.3"
