"""GVPO_SUBJECTS limits which test files import a framework."""

import sys

import pytest
import required


def test_a_file_of_another_subject_is_skipped_before_its_import(monkeypatch, tmp_path):
    (tmp_path / "noted_framework.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("GVPO_SUBJECTS", "torch,numpy")
    with pytest.raises(pytest.skip.Exception, match="does not name jax"):
        required.require("noted_framework", subject="jax")
    assert "noted_framework" not in sys.modules
    required.require("noted_framework", subject="torch")
    assert "noted_framework" in sys.modules


def test_a_missing_module_is_an_error_where_its_subject_is_named(monkeypatch):
    monkeypatch.setenv("GVPO_SUBJECTS", "jax")
    with pytest.raises(ImportError):
        required.require("no_such_framework", subject="jax")
    monkeypatch.setenv("GVPO_SUBJECTS", "")
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        required.require("no_such_framework", subject="jax")
