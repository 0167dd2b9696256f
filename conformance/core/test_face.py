"""`import gvpo`: the core's names at once, the trainer's on first use, and nothing else."""

import inspect
import subprocess
import sys

import pytest

import gvpo_core

pytestmark = pytest.mark.core

IMPORTED = """
import sys
before = set(sys.modules)
import gvpo
new = set(sys.modules) - before
top = {name.partition(".")[0] for name in new}
print(*sorted(x for x in top if x not in sys.stdlib_module_names and not x.startswith("_")))
assert "gvpo_core.objective" in new
assert not [name for name in new if name.startswith("gvpo_core.training")], "the trainer is imported on first use"
gvpo.Config
assert "gvpo_core.training" in sys.modules
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_import_costs_only_numpy_and_array_api_compat() -> None:
    done = run("-c", IMPORTED)
    assert (done.returncode, done.stdout.strip()) == (0, "array_api_compat gvpo gvpo_core numpy"), done.stderr


def test_the_names_are_those_of_the_core_and_of_the_trainer() -> None:
    import gvpo
    import gvpo_core.training as training

    assert set(gvpo.__all__) == {*gvpo_core.__all__, *training.__all__, "__version__"}
    assert len(set(gvpo.__all__)) == len(gvpo.__all__)
    assert dir(gvpo) == sorted(gvpo.__all__)
    for name in gvpo_core.__all__:
        assert getattr(gvpo, name) is getattr(gvpo_core, name)
    for name in training.__all__:
        assert getattr(gvpo, name) is getattr(training, name)
    assert gvpo.__version__ == gvpo_core.__version__
    assert inspect.isfunction(gvpo.train)


def test_a_star_import_brings_every_name() -> None:
    done = run("-c", "from gvpo import *; gvpo_loss, train, load_policy, Config, __version__")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "; did you mean 'train'?"),
        ("gvpo_los", "; did you mean 'gvpo_loss'?"),
        ("load_model", ""),
        ("xyz", ""),
    ],
)
def test_a_missing_name_is_an_attribute_error(name: str, hint: str) -> None:
    import gvpo

    with pytest.raises(AttributeError) as error:
        getattr(gvpo, name)
    assert str(error.value).startswith(f"module 'gvpo' has no attribute {name!r}")
    assert hint in str(error.value)
    assert not hasattr(gvpo, name)
    done = run("-c", f"from gvpo import {name}")
    assert "ImportError: cannot import name" in done.stderr


def test_the_package_as_a_module_is_the_command() -> None:
    done = run("-m", "gvpo", "--help")
    assert done.returncode == 0, done.stderr
    assert "gvpo train CONFIG" in done.stdout
