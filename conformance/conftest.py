"""Settings (subject, dtype, mode) for every test that asks for one, and the results that docs/conformance.md shows.

GVPO_SUBJECTS="torch,jax"       only these subjects, and a missing one is an error; without it a missing one is skipped
GVPO_CONFORMANCE_RESULTS=DIR    writes DIR/<subject>.json: passed and failed checks by capability
"""

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import subjects
from settings import MODES, Setting

MARKS = {
    "dtypes(*names)": "run in these dtypes only; default: all of the subject",
    "modes(*names)": "run in these modes only: eager, compiled; default: both",
    "needs(feature)": "run on subjects that have it: grad",
    "capability(name)": "the column of docs/conformance.md that the test counts in",
    "slow": "takes many seconds: `nox` leaves it out, `nox -s full` runs it",
    "slow_on(*ids)": "slow where the test's id has all words of one of these, which hyphens part",
    "core": "needs no subject but NumPy: runs where NumPy is among the subjects",
}
# What tests of the core are skipped without: missing is an error where GVPO_SUBJECTS names "core".
CORE = (
    "tyro",
    "tomli_w",
    "rich",
    "hypothesis",
    "math_verify",
    "datasets",
    "matplotlib",
    "tensorboard",
    "trackio",
    "openai",
)
# Not subjects: test files of their own ask for them.
ELSEWHERE = (
    "core",
    "trl",
    "verl",
    "tunix",
    "mlx_lm",
    "parity",
    "gpu",
    "browser",
    "full_disk",
    "openenv",
    "gymnasium",
    "ray",
    "verifiers",
)
# Files with a test of many seconds, in some environment. They start first: started last, they would keep one process
# busy while the others wait.
LONG_FILES = (
    "test_wheel",
    "test_objective_frameworks",
    "test_mutations",
    "test_torch_sharded",
    "test_torch_ranks_killed",
    "test_torch_ranks",
    "test_jax_prefixes",
    "test_explicit_mesh",
    "test_mlx_ranks",
    "test_mlx_update",
    "test_trainer",
    "test_generated_inputs",
    "test_ahead_copy",
    "test_reward_processes",
    "test_parity_jax",
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub: a name that is nowhere fails at once
_required = tuple(x for x in os.environ.get("GVPO_SUBJECTS", "").split(",") if x and x not in ELSEWHERE)
_results: dict[str, dict[str, Counter[str]]] = {}


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")
    if unknown := set(_required) - set(subjects.DTYPES):
        known = ", ".join(subjects.DTYPES)
        raise pytest.UsageError(f"GVPO_SUBJECTS names {', '.join(sorted(unknown))}; expected some of {known}")
    missing = [name for name in CORE if importlib.util.find_spec(name) is None]
    if missing and "core" in os.environ.get("GVPO_SUBJECTS", "").split(","):
        raise pytest.UsageError(f"GVPO_SUBJECTS names core, which needs {', '.join(missing)}: not installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" not in metafunc.fixturenames:
        return
    mark = lambda name, default: next((m.args for m in metafunc.definition.iter_markers(name)), default)
    wanted = [
        (subject, dtype, mode)
        for subject in _required or subjects.DTYPES
        for dtype in subjects.DTYPES[subject]
        for mode in MODES
        if dtype in mark("dtypes", (dtype,))
        and mode in mark("modes", (mode,))
        and (mode == "eager" or subject in subjects.COMPILED)
        and ("grad" not in mark("needs", ()) or subject in subjects.DIFFERENTIABLE)
    ]
    metafunc.parametrize("setting", wanted, ids=["-".join(x) for x in wanted], indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Starts at a different file in each process of pytest-xdist, so that one process compiles a file for all."""
    report = yield
    of_process = getattr(collector.config, "workerinput", None)
    if of_process and isinstance(collector, pytest.Directory) and report.passed:
        start = int(of_process["workerid"].removeprefix("gw")) * len(report.result) // of_process["workercount"]
        report.result[:] = [*report.result[start:], *report.result[:start]]
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)  # marks before pytest selects by them, the order after
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for item in items:
        if _is_slow(item):
            item.add_marker("slow")
    if _required and "numpy" not in _required:
        left_out = [item for item in items if item.get_closest_marker("core")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path)  # pytest_make_collect_report has changed the order
    yield
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.stem not in LONG_FILES, -tests[item.path]))


def _is_slow(item: pytest.Item) -> bool:
    """What slow_on names; compiled cases with weights of responses or in other dtypes than float32; compiled values and
    gradients of MLX and PyTorch, whose compilers another file tries once; JAX's values and gradients in 16 bits but one
    case, as each operation is a program; array-api-strict's properties.
    """
    if not hasattr(item, "callspec"):
        return False
    words = set(item.callspec.id.split("-"))
    if any(words.issuperset(name.split("-")) for mark in item.iter_markers("slow_on") for name in mark.args):
        return True
    chosen = item.callspec.params.get("setting")
    if not isinstance(chosen, tuple):  # no setting, or none that fits
        return False
    subject, dtype, mode = chosen
    if mode == "compiled":
        if subject in ("mlx", "torch") and item.originalname in ("test_values", "test_gradients"):
            return True
        return dtype != "float32" or "response-weights" in item.name
    if subject == "jax" and dtype in ("float16", "bfloat16") and item.originalname in ("test_values", "test_gradients"):
        return "even" not in words
    return subject == "array-api-strict" and item.path.name == "test_properties.py"


@cache
def _load(name: str) -> subjects.Subject | ImportError:
    try:
        return subjects.load(name)
    except ImportError as e:
        return e


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    name, dtype, mode = request.param
    subject = _load(name)
    if isinstance(subject, ImportError):
        if name in _required:
            raise subject
        pytest.skip(f"{name}: {subject}")
    with subject.context(dtype):
        yield Setting(subject, dtype, mode)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250419)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    params = getattr(item, "callspec", None)
    if params and "setting" in params.params and (report.when == "call" or report.failed):
        subject, dtype, mode = params.params["setting"]
        report.counts_in = []  # goes with the report from the process that ran the test
        for mark in item.iter_markers("capability"):
            name = mark.args[0] + (" compiled" if mode == "compiled" else "")
            report.counts_in += [[subject, name], [subject, dtype]]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for subject, name in getattr(report, "counts_in", ()):
        _results.setdefault(subject, {}).setdefault(name, Counter())[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    directory = os.environ.get("GVPO_CONFORMANCE_RESULTS")
    if not directory or hasattr(session.config, "workerinput"):  # a process of pytest-xdist hands its reports on
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, result in _results.items():
        loaded = _load(name)
        version = getattr(getattr(loaded, "namespace", None), "__version__", None)
        found = {"subject": name, "version": version or _version(name), "capabilities": result}
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        (Path(directory) / f"{name}.json").write_text(text, encoding="utf-8")


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)
