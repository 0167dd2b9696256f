"""The suite goes red for each of these mistakes: the core is copied, broken in one place, and tested by the suite."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

VALUES = ["test_objective_values.py", "test_groups.py", "test_paper.py", "test_response_weights.py"]
GRADIENTS = ["test_objective_gradients.py", "test_objective_constants.py"]
ERRORS = ["test_objective_errors.py"]

# mistake -> file, text, text in its place, tests that must fail
MUTANTS = {
    "1/k for 1/(k-1)": ("objective.py", "divisor(less=1) for product", "divisor() for product", VALUES),
    "coefficients over k": (
        "objective.py",
        "groups.per_row(groups.divisor(less=1) *",
        "groups.per_row(groups.divisor() *",
        VALUES,
    ),
    "mean over the batch, not the group": (
        "groups.py",
        "mean = group_mean_of_rows(values, counted, group_ids, num_groups)",
        "mean = group_mean_of_rows(values, counted, 0 * group_ids, num_groups)",
        VALUES,
    ),
    "masked sibling left in the mean": (
        "groups.py",
        "size = group_sum(xp.astype(counted, values.dtype), group_ids, num_groups)\n    return",
        "size = group_sum(xp.ones_like(values), group_ids, num_groups)\n    return",
        VALUES,
    ),
    "valid ignored": ("groups.py", "else valid & ~xp.isnan(rewards)", "else ~xp.isnan(rewards)", VALUES),
    "singletons counted in G": (
        "objective.py",
        "num_groups, valid, smallest=2",
        "num_groups, valid, smallest=1",
        VALUES,
    ),
    "sign of the implicit reward": (
        "objective.py",
        "return groups, logprobs - ref_logprobs, rewards",
        "return groups, ref_logprobs - logprobs, rewards",
        VALUES,
    ),
    "beta forgotten": (
        "objective.py",
        "constant(beta) * groups.center(log_ratio)",
        "groups.center(log_ratio)",
        VALUES,
    ),
    "response weights left out of the step": (
        "objective.py",
        "return self.weights() if self.factors is None else self.factors * self.weights()",
        "return self.weights()",
        VALUES,
    ),
    "response weights left out of the implicit reward": (
        "objective.py",
        "log_ratio = factors * log_ratio",
        "log_ratio = 1 * log_ratio",
        VALUES,
    ),
    "response weights divide": (
        "objective.py",
        "log_ratio = factors * log_ratio",
        "log_ratio = log_ratio / factors",
        VALUES,
    ),
    "one Newton step": ("regret.py", "NEWTON_STEPS = 12", "NEWTON_STEPS = 1", VALUES),
    "ratio not clipped": (
        "baselines.py",
        "zeroed = clipped | (advantages == 0) if",
        "zeroed = (advantages == 0) if",
        VALUES,
    ),
    "clipped on the wrong side": (
        "baselines.py",
        "(advantages > 0) & (ratio > 1",
        "(advantages < 0) & (ratio > 1",
        VALUES,
    ),
    "eps forgotten": ("baselines.py", "groups.divisor(less=ddof)) + eps", "groups.divisor(less=ddof))", VALUES),
    "RLOO without k/(k-1)": (
        "baselines.py",
        "groups.divisor() / groups.divisor(less=1))",
        "groups.divisor(less=1) / groups.divisor(less=1))",
        VALUES,
    ),
    "MaxRL over the spread": (
        "baselines.py",
        "scale = groups.per_row(groups.xp.where(positive, mean,",
        "scale = groups.per_row(groups.xp.where(positive, mean**0.5,",
        VALUES,
    ),
    "A*-PO from responses of the reference": (
        "residuals.py",
        "groups.center(rewards) / beta - old)",
        "groups.center(rewards) / beta)",
        VALUES,
    ),
    "mirror descent centred": (
        "residuals.py",
        "- beta * _counted(groups, log_ratio)",
        "- beta * groups.center(log_ratio)",
        VALUES,
    ),
    "GSPO without the length of its gradient": (
        "objectives.py",
        "valid=groups.counted) / lengths",
        "valid=groups.counted)",
        VALUES,
    ),
    "trajectory balance over k - 1": (
        "objectives.py",
        '"trajectory_balance": Objective(_gvpo, 2, False, _responses)',
        '"trajectory_balance": Objective(_gvpo, 2, False, _degrees_of_freedom)',
        VALUES,
    ),
    "the first of tied winners": (
        "groups.py",
        "return chosen / self.per_row(",
        "return chosen + 0 * self.per_row(",
        VALUES,
    ),
    "DPO's pair turned round": (
        "preferences.py",
        "share, sigmoid = chosen - rejected,",
        "share, sigmoid = rejected - chosen,",
        VALUES,
    ),
    "sum over tokens turned into mean": (
        "objective.py",
        "return xp.sum(xp.where(mask, wide, xp.zeros_like(wide)), axis=1)",
        "return xp.mean(xp.where(mask, wide, xp.zeros_like(wide)), axis=1)",
        ERRORS,
    ),
    "16-bit sums": (
        "_arrays.py",
        "max([xp.float32, *floats]",
        "max(floats",
        VALUES,
    ),
    "weights differentiated through": (
        "_arrays.py",
        'if hasattr(x, "detach"):  # torch\n        return x.detach()',
        'if hasattr(x, "detach"):  # torch\n        return x',
        GRADIENTS,
    ),
    "the reference differentiated": (
        "objective.py",
        "ref_logprobs, rewards = stop_gradient(ref_logprobs), stop_gradient(rewards)",
        "rewards = stop_gradient(rewards)",
        GRADIENTS,
    ),
}


def run_suite(root: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest on a copy of the suite, stopping at the first failure; NumPy, or torch where gradients are wanted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GVPO_", "PYTEST_", "PYTHONPATH"))}
    environment["GVPO_SUBJECTS"] = "torch" if tests == GRADIENTS else "numpy"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"]
    if tests == GRADIENTS:
        command += ["-k", "eager and float32"]
    else:
        command += ["-k", "not minimiser and not large"]
    command += [f"conformance/core/{name}" for name in tests]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "results", "training")
    for name in ("gvpo_core", "conformance"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _need_torch(tests: list[str]) -> None:
    """Gradients are torch's: they are tested where GVPO_SUBJECTS names torch, or names nothing and torch is there."""
    if tests != GRADIENTS:
        return
    names = [name for name in os.environ.get("GVPO_SUBJECTS", "").split(",") if name]
    if names and "torch" not in names:
        pytest.skip("GVPO_SUBJECTS does not name torch")
    if importlib.util.find_spec("torch") is None:
        assert not names, "GVPO_SUBJECTS names torch, which is not installed"
        pytest.skip("differentiates with torch")


WHOLE = [
    pytest.param(VALUES + ERRORS, id="numpy", marks=pytest.mark.core),
    pytest.param(GRADIENTS, id="torch"),  # without the mark: it runs in torch's session
]


@pytest.mark.slow_on("torch")
@pytest.mark.parametrize("tests", WHOLE)
def test_green_without_a_mutant(copy: Path, tests: list[str]) -> None:
    _need_torch(tests)
    done = run_suite(copy, tests)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# Three that `nox` runs: of the values, of the groups and of the gradients.
FAST = ("1/k for 1/(k-1)", "mean over the batch, not the group", "weights differentiated through")
NAMES = [
    pytest.param(
        name,
        marks=[pytest.mark.slow] * (name not in FAST) + [pytest.mark.core] * (mutant[-1] != GRADIENTS),
    )
    for name, mutant in MUTANTS.items()
]


@pytest.mark.parametrize("name", NAMES, ids=lambda x: x.replace(" ", "-"))
def test_red_with_a_mutant(copy: Path, name: str) -> None:
    file, text, broken, tests = MUTANTS[name]
    _need_torch(tests)
    path = copy / "gvpo_core" / file
    source = path.read_text(encoding="utf-8")
    assert source.count(text) == 1, f"{file} has {source.count(text)} times {text!r}; mend the mutant"
    path.write_text(source.replace(text, broken), encoding="utf-8")
    done = run_suite(copy, tests)
    # 1: tests ran and some failed; anything else would be a suite that could not run
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "SyntaxError" not in done.stdout and "NameError" not in done.stdout
