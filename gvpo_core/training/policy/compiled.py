"""JAX's cache of compiled programs on disk, so that a restarted run does not compile again."""

import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_compiled(environment: MutableMapping[str, str]) -> Path | None:
    """Sets JAX's persistent compilation cache for a process that has not imported JAX yet.

    The folder is gvpo/jax/HOST in the user's cache, since a program compiled for one CPU may not run on another.

    Returns: the folder; None if the user has set one, JAX is already imported, or no folder can be written.
    """
    if VARIABLE in environment or "jax" in sys.modules:
        return None
    try:
        cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "gvpo" / "jax" / (platform.node() or "host")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    if not os.access(folder, os.W_OK):
        return None
    environment[VARIABLE] = str(folder)
    return folder
