"""`objective.name` as an import path: the user's function takes the table's place, exactly, or is rejected by name."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from places import ROOT
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.objectives import OBJECTIVES, TABLE
from gvpo_core.training.config import Config, ConfigError, ObjectiveConfig
from gvpo_core.training.config.check import check_config
from gvpo_core.training.dealing import Deal
from gvpo_core.training.improve import _coefficients
from gvpo_core.training.loop import train
from gvpo_core.training.objective import ObjectiveError, check_objective, find_objective
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.table import TablePolicy

pytestmark = pytest.mark.core

GVPO = '''
import numpy as np

CALLS = []


def gvpo(logprobs, ref_logprobs, old_logprobs, rewards, group_ids, *, beta):
    """Eq. 12 and 16 with a loop over groups."""
    CALLS.append(len(logprobs))
    c = np.zeros(len(logprobs))
    groups = [np.flatnonzero(group_ids == g) for g in np.unique(group_ids)]
    groups = [rows for rows in groups if len(rows) >= 2]
    for rows in groups:
        implicit = beta * (logprobs[rows] - ref_logprobs[rows])
        w = rewards[rows] - rewards[rows].mean() - (implicit - implicit.mean())
        c[rows] = w / (len(rows) - 1) / len(groups)
    return c
'''


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str, name: str = "own") -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return f"{path}:{name}"

    return write


def trained(folder: Path, **objective) -> np.ndarray:
    config = settings(folder)
    config = replace(
        config,
        run=replace(config.run, steps=4),
        objective=replace(config.objective, **objective),
        optimizer=replace(config.optimizer, learning_rate=2.0),
    )
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    train(config, policy, train_rows=[{"prompt": p} for p in PROMPTS], rewards={"value": reward})
    return np.exp(policy.log_table())


def test_the_documented_example_is_rloo(tmp_path: Path) -> None:
    path = f"{ROOT / 'examples/own_objective.py'}:leave_one_out"
    own, named = (trained(tmp_path / n, name=name, beta=0.0) for n, name in (("a", path), ("b", "rloo")))
    assert np.abs(own - REFERENCE).max() > 0.01
    np.testing.assert_allclose(own, named, rtol=1e-10)


def test_the_documentation_shows_the_example() -> None:
    code = (ROOT / "examples/own_objective.py").read_text(encoding="utf-8").partition("import numpy")[2]
    assert f"```python\nimport numpy{code}```" in (ROOT / "docs/objectives.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("splits", [{}, {"epochs": 2, "minibatches": 3}, {"epochs": 2, "reference": "rollout"}])
def test_gvpo_as_a_function_takes_the_steps_of_gvpo(splits: dict, file, tmp_path: Path) -> None:
    path = file(GVPO, "gvpo_of_mine").replace(":gvpo_of_mine", ":gvpo")
    own, named = (trained(tmp_path / n, name=name, **splits) for n, name in (("a", path), ("b", "gvpo")))
    assert np.abs(own - REFERENCE).max() > 0.01
    np.testing.assert_allclose(own, named, rtol=1e-10)
    from gvpo_core.training.rewards.worker.functions import find_function

    assert find_function(path).__globals__["CALLS"], "the function is what ran"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("import nothing_of_this_name", "importing .* failed: ModuleNotFoundError"),
        ("other = 1", "has no function own"),
        ("def own(logprobs, rewards):\n    return rewards", "has other arguments .*; expected own\\(logprobs, ref_log"),
        ("def own(*a, lr):\n    return a[0]", "has other arguments .*'lr'"),
        ("def own(*a):\n    return a[0]\nown.smallest = 0", "has smallest = 0; expected 1 or more"),
    ],
)
def test_a_function_that_cannot_be_used_is_rejected_before_anything_runs(text, message, file, tmp_path) -> None:
    path = file(text) if text is not None else f"{tmp_path}/none.py:own"
    with pytest.raises(ConfigError, match=rf"objective\.name = .*{message}"):
        trained(tmp_path / "run", name=path)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "raised KeyError: 'x'"),
        ("return rewards[:2]", r"gave an array of shape \(2,\); expected \(48,\)"),
        ("return 'many'", "raised ValueError"),
    ],
)
def test_a_function_that_fails_is_named(body: str, message: str, file, tmp_path: Path) -> None:
    path = file(f"def own(logprobs, ref_logprobs, old_logprobs, rewards, group_ids):\n    {body}")
    with pytest.raises(ObjectiveError, match=rf"objective\.name = .* {message}"):
        trained(tmp_path / "run", name=path)


def test_coefficients_that_are_not_finite_stop_the_run(file, tmp_path: Path) -> None:
    path = file("def own(logprobs, *others):\n    return logprobs * float('nan')")
    with pytest.raises(FloatingPointError, match="not finite"):
        trained(tmp_path / "run", name=path)


def test_the_function_cannot_change_what_the_trainer_holds(file) -> None:
    path = file(
        "def own(logprobs, ref_logprobs, old_logprobs, rewards, group_ids):\n    rewards += 1\n    return rewards"
    )
    arrays = [np.zeros(4), np.zeros(4), np.zeros(4), np.arange(4.0), np.array([0, 0, 1, 1])]
    find_objective(ObjectiveConfig(name=path)).coefficients(*arrays, 2, np.ones(4, int))
    np.testing.assert_array_equal(arrays[3], np.arange(4.0))


@pytest.mark.parametrize("whole_batch", [True, False])
def test_a_function_that_reads_other_groups_is_rejected(whole_batch: bool, file) -> None:
    """A call may bring some groups of a step, and numbers that stand in for the others' log-probs."""
    value = "rewards - logprobs.mean()" if whole_batch else "rewards - logprobs"
    path = file(f"def own(logprobs, ref_logprobs, old_logprobs, rewards, group_ids):\n    return {value}")
    groups, scores = np.array([0, 0, 1, 1]), np.arange(4.0)
    rollout = SimpleNamespace(group_ids=groups, rewards=scores, lengths=np.ones(4, int))
    policy = SimpleNamespace(world_size=1)
    chosen, rows = np.ones(4, bool), np.arange(4)
    dealt = Deal(Batch([(1,)] * 4, [(1,)] * 4, groups.tolist()), rows, rows, True)
    coefficients = _coefficients(policy, rollout, find_objective(ObjectiveConfig(name=path)), None, None, chosen, dealt)
    part = np.array([2, 3])
    if whole_batch:
        with pytest.raises(ObjectiveError, match="another coefficient when the log-probs of other groups change"):
            coefficients(np.array([-1.0, -2.0]), part)
    else:
        np.testing.assert_allclose(coefficients(np.array([-1.0, -2.0]), part), [3.0, 5.0])


def test_a_group_has_as_many_responses_as_the_function_asks_for(file) -> None:
    path = file("def own(*a):\n    return a[3]\nown.smallest = 3")
    config = Config(objective=ObjectiveConfig(name=path))
    assert find_objective(config.objective).smallest == 3
    check_objective(replace(config, rollout=replace(config.rollout, responses=3)))
    with pytest.raises(ConfigError, match=r"rollout\.responses = 2; expected at least 3 for objective\.name"):
        check_objective(replace(config, rollout=replace(config.rollout, responses=2)))


def test_names_without_a_function_are_rejected_with_a_suggestion() -> None:
    for name in ("gvp", "own.py", ":own", "own.py:"):
        with pytest.raises(
            ConfigError, match=rf"objective\.name = '{name}'; expected one of 'gvpo', .*file\.py:function"
        ):
            check_config(Config(objective=ObjectiveConfig(name=name)))


RATIO = {"a_star_po", "grpo", "dr_grpo", "rloo", "gspo", "maxrl"}  # they read the log-probabilities at sampling


def test_the_table_is_what_the_trainer_asks() -> None:
    assert tuple(TABLE) == OBJECTIVES
    for name, row in TABLE.items():
        found = find_objective(ObjectiveConfig(name=name))
        assert (found.smallest, found.needs_old, found.function) == (row.smallest, row.needs_old, None)
    assert {name for name, row in TABLE.items() if row.smallest == 1} == {"sft", "reject_sampling"}
    assert {name for name, row in TABLE.items() if row.needs_old} == RATIO


@pytest.mark.parametrize("name", ["wave", "numpy", "iniconfig"])
def test_a_file_with_the_name_of_a_package_does_not_take_its_place(name: str, file) -> None:
    """A module that is installed and not imported yet keeps its name, too."""
    import sys

    from gvpo_core.training.rewards.worker.functions import find_function

    was = sys.modules.pop(name, None) if name == "iniconfig" else sys.modules.get(name)
    try:
        path = file(GVPO, name).rpartition(":")[0]
        function = find_function(f"{path}:gvpo")
        assert function.__code__.co_filename == path
        assert function.__module__ != name and sys.modules[function.__module__].gvpo is function
        assert getattr(sys.modules.get(name), "__file__", None) != path
    finally:
        if was is not None:
            sys.modules[name] = was


def test_a_changed_objective_file_is_noted_like_a_changed_reward(file, tmp_path: Path) -> None:
    from gvpo_core.training.config import Config
    from gvpo_core.training.config import ObjectiveConfig as Objective
    from gvpo_core.training.fingerprint import changes, run_inputs

    spec = file(GVPO, "mine").replace(":mine", ":gvpo")
    config = Config(objective=Objective(name=spec))
    before = run_inputs(config, [{"prompt": "p"}], [])
    assert before["objective"]["name"]["sha256"] and run_inputs(Config(), [], [])["objective"] == {}
    Path(spec.rpartition(":")[0]).write_text(GVPO + "\n# changed\n")
    noted, refused = changes(before, run_inputs(config, [{"prompt": "p"}], []))
    assert [line.split(":")[0] for line in noted] == ["objective.name"] and not refused
