"""Importing the core costs numpy and array-api-compat, and changes nothing."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

IMPORTED = """
import sys, importlib.metadata
before = set(sys.modules)
import gvpo_core
top = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(x for x in top if x not in sys.stdlib_module_names and not x.startswith("_")))
"""

SETTINGS = """
import warnings, numpy as np, os, threading
def get():
    random = np.random.get_state()[1].tolist()
    return np.geterr(), dict(os.environ), threading.active_count(), random, list(warnings.filters)
before = get()
import gvpo_core
assert get() == before
"""

FRAMEWORK = {
    "torch": "import torch as f; get = lambda: (f.get_default_dtype(), f.get_num_threads(), f.is_grad_enabled(), "
    "f.initial_seed(), f.are_deterministic_algorithms_enabled())",
    "jax": "import jax as f; get = lambda: dict(f.config.values)",
    "mlx.core": "import mlx.core as f; get = lambda: f.default_device()",
}
USE = """
before = get()
import gvpo_core
assert get() == before
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_numpy_and_array_api_compat() -> None:
    assert run(IMPORTED) == "array_api_compat gvpo_core numpy"


def test_no_setting_changes() -> None:
    run(SETTINGS)


@pytest.mark.parametrize("name", FRAMEWORK)
def test_no_setting_of_a_framework_changes(name: str) -> None:
    pytest.importorskip(name)
    run(FRAMEWORK[name] + USE)
