"""Starts the worker from its own files, as a package with another name, so that gvpo is not imported."""

import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_NAME = "gvpo_reward_worker"

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(
        _NAME, os.path.join(_HERE, "__init__.py"), submodule_search_locations=[_HERE]
    )
    assert spec is not None
    sys.modules[_NAME] = importlib.util.module_from_spec(spec)
    importlib.import_module(f"{_NAME}.serve").main(int(sys.argv[1]), int(sys.argv[2]))
