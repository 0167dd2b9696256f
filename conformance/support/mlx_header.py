"""Precompiles the header that MLX puts before each kernel that it compiles on CPU, nine tenths of the compiler's time.

For an environment of tests: the file lies beside MLX's header. Without MLX or g++ nothing is done, and a compiler that
cannot use the file compiles as before.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

OPTIONS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # MLX's own: g++ uses the file with the same ones alone


def main() -> None:
    mlx = find_spec("mlx")
    if mlx is None or not shutil.which("g++"):
        return
    included = Path(next(iter(mlx.submodule_search_locations or ()))) / "include"
    header = included / "mlx" / "backend" / "cpu" / "compiled_preamble.h"
    made = header.with_name(f"{header.name}.gch")
    if made.exists() and made.stat().st_mtime > header.stat().st_ctime:  # ctime: when it was installed
        return
    command = ["g++", *OPTIONS, "-w", "-x", "c++-header", "-I", str(included), str(header), "-o", str(made)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        made.unlink(missing_ok=True)
        sys.exit(f"MLX's header does not compile by itself: {run.stderr[-500:]}")


if __name__ == "__main__":
    main()
