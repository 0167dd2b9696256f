"""What a test file needs to be installed."""

import importlib
import os

import pytest
from trainer_backends import BACKENDS


def require(*modules: str, subject: str) -> None:
    """Skips the test file where a module is missing; an error where GVPO_SUBJECTS asks for the subject. Where it names
    other subjects alone, the file is skipped before anything is imported.

    Args:
      modules: default: what the backend of this name needs.
    """
    names = [name for name in os.environ.get("GVPO_SUBJECTS", "").split(",") if name]
    asked = subject in names
    if names and not asked:
        pytest.skip(f"GVPO_SUBJECTS does not name {subject}", allow_module_level=True)
    for name in modules or BACKENDS[subject].modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            if asked:
                raise
            pytest.skip(f"{name} is not installed: {error}", allow_module_level=True)
