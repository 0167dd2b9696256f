"""JAX's compilation cache is on in a run, where the user keeps caches, and never stops a run."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gvpo_core.training.policy import compiled


@pytest.fixture(autouse=True)
def without_jax(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)


def test_the_folder_is_in_the_users_cache(tmp_path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = compiled.keep_compiled(environment)
    assert folder is not None and folder.is_dir() and tmp_path / "gvpo" / "jax" in folder.parents
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)


def test_the_users_own_folder_stays(tmp_path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
    assert compiled.keep_compiled(environment) is None
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere" and not list(tmp_path.iterdir())


def test_a_process_that_has_imported_jax_keeps_its_settings(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", object())
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert compiled.keep_compiled(environment) is None and list(environment) == ["XDG_CACHE_HOME"]


def test_a_cache_that_cannot_be_made_is_left_out(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert compiled.keep_compiled(environment) is None and list(environment) == ["XDG_CACHE_HOME"]


@pytest.mark.skipif(not find_spec("jax"), reason="JAX is not installed")
def test_loading_a_policy_turns_the_cache_on_before_jax_is_imported(tmp_path) -> None:
    script = """
import sys
from gvpo_core.training.config import Config
from gvpo_core.training.policy.load import load_policy
import dataclasses
assert "jax" not in sys.modules
config = Config()
config = dataclasses.replace(config, run=dataclasses.replace(config.run, backend="jax"))
config = dataclasses.replace(config, model=dataclasses.replace(config.model, path="/nowhere"))
try:
    load_policy(config)
except Exception as error:
    print(type(error).__name__)
import jax
print(jax.config.jax_compilation_cache_dir)
"""
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    name, folder = done.stdout.splitlines()
    assert name == "ConfigError" and tmp_path in Path(folder).parents
