"""gvpo doctor with frameworks whole, absent, broken and hanging: always an answer, in time, with the fix."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from places import ROOT

from gvpo_core import __version__
from gvpo_core.training.cli import doctor

pytestmark = pytest.mark.core


def diagnose(folder, *arguments, path="", limit=60):
    """Runs the doctor with `folder` first on the module path and `limit` seconds for imports; returns the process."""
    code = f"import sys; from gvpo_core.training.cli import doctor as d; d.LIMIT = {limit}; "
    code += f"sys.exit(d.doctor({', '.join(arguments)}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    if path:
        environment["PATH"] = path
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=300
    )


def fake(folder, name, version, code=""):
    """A distribution of one module, as an installer leaves it."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def findings(done):
    return {f["name"]: f for f in json.loads(done.stdout)["findings"]}


def test_doctor_passes_here_and_lists_what_is_installed(tmp_path):
    done = diagnose(tmp_path, "json=True")
    found = findings(done)
    assert done.returncode == 0, done
    assert found["gvpo"]["detail"] == __version__
    import numpy

    assert found["numpy"] == {"status": "ok", "name": "numpy", "detail": numpy.__version__, "fix": ""}
    for name in ("torch", "jax", "mlx"):
        here = doctor._version(name)
        assert found[name]["detail"].startswith(here or "not installed")


WORKS = """
class _None:
    def is_available(self): return False
    def device_count(self): return 0
class version: cuda = hip = None
class backends: mps = _None()
cuda = _None()
def get_num_threads(): return 7
"""


def test_a_working_framework_names_its_devices(tmp_path):
    fake(tmp_path, "torch", "2.13.0", WORKS)
    found = findings(diagnose(tmp_path, "json=True"))
    assert found["torch"]["status"] == "ok" and found["torch"]["detail"] == "2.13.0; cpu, 7 threads"


@pytest.mark.slow
def test_a_slow_import_is_no_warning(tmp_path):
    fake(tmp_path, "torch", "2.13.0", f"import time; time.sleep(3)\n{WORKS}")
    found = findings(diagnose(tmp_path, "json=True", limit=doctor.LIMIT))
    assert found["torch"]["status"] == "ok", found["torch"]


def test_a_build_without_cuda_beside_a_gpu_is_a_warning(tmp_path):
    fake(tmp_path, "torch", "2.13.0", WORKS)
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA X, 80000 MiB, 1.2'\n")
    tool.chmod(0o755)
    found = findings(diagnose(tmp_path, "json=True", path=f"{tool.parent}{os.pathsep}{os.environ['PATH']}"))
    assert found["NVIDIA driver"]["detail"] == "NVIDIA X, 80000 MiB, 1.2"
    assert found["torch"]["status"] == "warning" and "CUDA build" in found["torch"]["fix"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libfoo.so.1: cannot open')", "its import fails: ImportError: libfoo.so.1: cannot open"),
        ("import os; os._exit(0)", "its import fails: exited with status 0"),
        ("import os; os.abort()", "its import fails: exited with status -6"),
        ("print('[]')", "its import fails: AttributeError"),
    ],
)
def test_a_broken_framework_is_named_with_its_mend(tmp_path, code, said):
    fake(tmp_path, "torch", "2.13.0", code)
    done = diagnose(tmp_path, "json=True")
    torch = findings(done)["torch"]
    assert done.returncode == 1 and torch["status"] == "wrong"
    assert said in torch["detail"] and torch["fix"].startswith("pip install --force-reinstall")


@pytest.mark.slow
def test_a_hanging_framework_does_not_hold_the_doctor_and_leaves_no_process(tmp_path):
    mark = tmp_path / "child"
    code = "import os, subprocess, sys, time\n"
    code += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])\n"
    code += f"open({str(mark)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}')\ntime.sleep(3600)"
    fake(tmp_path, "jax", "0.10.2", code)
    done = diagnose(tmp_path, "json=True", limit=3)  # the import would take an hour
    jax = findings(done)["jax"]
    assert done.returncode == 0, done
    assert jax["status"] == "warning" and "did not finish in" in jax["detail"] and "importtime" in jax["fix"]
    deadline = time.monotonic() + 60
    while any(alive(int(pid)) for pid in mark.read_text().split()):
        assert time.monotonic() < deadline, "a process of the hanging import is still there"
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs; a zombie that nobody has reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_versions_outside_the_range_are_wrong_with_the_line_that_mends(tmp_path):
    fake(tmp_path, "torch", "2.1.0")
    fake(tmp_path, "transformers", "6.0.0")
    done = diagnose(tmp_path)
    lines = done.stdout.splitlines()
    assert "wrong    torch             2.1.0; gvpo needs >=2.13" in lines
    assert (
        '-> pip install "torch>=2.13"' in lines[lines.index("wrong    torch             2.1.0; gvpo needs >=2.13") + 1]
    )
    assert "wrong    transformers      6.0.0; gvpo needs >=5.10.1,<6" in lines
    assert done.returncode == 1 and lines[-1].endswith("the worst is: wrong")


def test_damaged_metadata_is_not_installed(tmp_path):
    (tmp_path / "wandb-1.0.dist-info").mkdir()
    assert findings(diagnose(tmp_path, "json=True"))["wandb"]["status"] == "ok"


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("2.13.0+cpu", ">=2.9", True),
        ("2.9", ">=2.9.0", True),
        ("2.10", ">=2.9", True),
        ("2.8.9", ">=2.9", False),
        ("6.0.0.dev1", ">=5.10,<6", False),
        ("5.10.0rc1", ">=5.10,<6", True),
        ("unknown", ">=1", False),
    ],
)
def test_versions_compare_by_number(version, wanted, good):
    assert doctor.satisfies(version, wanted) is good


def test_the_ranges_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = {"core": project["dependencies"]} | project["optional-dependencies"]
    for extra, wanted in doctor.REQUIRED.items():
        ranges = {}
        for line in given[extra]:
            name, bounds = re.fullmatch(r"([\w-]+)(?:\[\w+\])?([^;]*)(?:;.*)?", line).groups()
            if name != "gvpo":
                ranges[name] = bounds.strip()
        assert ranges == wanted, extra
