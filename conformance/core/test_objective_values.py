"""Values of every function of the core against the reference, on all subjects, dtypes and modes."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import subjects
from cases import CASES, WORKED, Case, Worked, draw, permute
from quantities import everything
from reference import advantages, reference
from settings import Setting

import gvpo_core as core

COLUMN = {
    "ragged": "ragged groups",
    "padding": "padding",
    "NaN in one group": "NaN stays in its group",
    "unscored": "unscored rows leave",
    "response weights": "response weights (GVPO++)",
}


def _everything(beta: float, num_groups: int) -> Callable[..., Any]:
    return lambda arrays: everything(arrays, beta=beta, num_groups=num_groups)


def _told_apart(beta: float, num_groups: int) -> Callable[..., Any]:
    """Of zeros (L,) and arrays: each output has a zero added that is its own."""

    def call(zeros: Any, arrays: dict[str, Any]) -> dict[str, Any]:
        out = everything(arrays, beta=beta, num_groups=num_groups)
        return {name: x + zeros[i].astype(x.dtype) for i, (name, x) in enumerate(out.items())}

    return call


def _check(setting: Setting, case: Case) -> None:
    arrays, expected = setting.arrays(case), reference(setting.rounded(case))
    if setting.mode == "compiled" and setting.subject.name == "mlx":
        # MLX 0.32.4: mx.compile fails (IndexError: _Map_base::at) where outputs simplify to one through stop_gradient
        zeros = setting.array(np.zeros(len(expected)))
        got = setting.function(_told_apart, case.beta, case.num_groups)(zeros, arrays)
    else:
        got = setting.function(_everything, case.beta, case.num_groups)(arrays)
    assert set(got) == set(expected)
    for name, values in expected.items():
        setting.check(f"{case.name} {name}", got[name], values)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.capability(COLUMN.get(c.name, "values"))) for c in CASES],
    ids=lambda c: c.name.replace(" ", "-"),
)
def test_values(setting: Setting, case: Case) -> None:
    _check(setting, case)


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.parametrize("worked", WORKED, ids=lambda w: w.name.replace(" ", "-"))
def test_worked_by_hand(setting: Setting, worked: Worked) -> None:
    case = worked.case
    got = everything(setting.arrays(case), beta=case.beta, num_groups=case.num_groups)
    for name, expected in worked.expected.items():
        setting.check(f"{worked.name} {name}", got[name], expected)


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float64", "float32")
def test_no_arguments_but_the_necessary(setting: Setting) -> None:
    """num_groups and valid left out; rewards integer, as a verifier gives them."""
    case = replace(CASES[1], rewards=np.arange(12) % 3)
    a = setting.arrays(case)
    scores = (a["logprobs"], a["ref_logprobs"], setting.array(case.rewards), a["group_ids"])
    expected = reference(setting.rounded(replace(case, rewards=case.rewards.astype(float), num_groups=4)))
    setting.check("weights", core.gvpo_weights(*scores, beta=0.3), expected["gvpo_weights"])
    setting.check("loss", core.gvpo_loss(*scores, beta=0.3).group_loss, expected["gvpo_loss.group_loss"])


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float64", "float32")
def test_beta_zero(setting: Setting) -> None:
    """Without KL, GVPO is REINFORCE with RLOO's baseline: w = D(R), and its coefficients are RLOO's."""
    case = replace(CASES[1], beta=0.0)
    a = setting.arrays(case)
    scores = (a["logprobs"], a["ref_logprobs"], a["rewards"], a["group_ids"])
    setting.check("w", core.gvpo_weights(*scores, beta=0), advantages(setting.rounded(case), "dr_grpo", 0))
    rloo = core.objective_coefficients("rloo", scores[0], scores[1], scores[0], *scores[2:], beta=0.0)
    setting.check("c", core.gvpo_coefficients(*scores, beta=0), setting.numpy(rloo))


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float64", "float32")
@pytest.mark.parametrize("beta", [0.1, 1.7])
def test_rloo_is_gvpo_where_the_policy_has_not_moved(setting: Setting, beta: float) -> None:
    for case in CASES:
        a = setting.arrays(case)
        scores = (a["logprobs"], a["ref_logprobs"], a["rewards"], a["group_ids"])
        options = {"beta": beta, "valid": a["valid"], "num_groups": 5}
        rloo = core.objective_coefficients("rloo", scores[0], scores[1], scores[0], *scores[2:], **options)
        setting.check(case.name, core.gvpo_coefficients(*scores, **options), setting.numpy(rloo))


LARGE = permute(draw("large", (8,) * 8192, seed=13, groups=8192), np.random.default_rng(14).permutation(65536))


@cache
def _large_reference(subject: str) -> dict[str, np.ndarray]:
    """Of LARGE in float32; every subject rounds to it alike."""
    return reference(Setting(subjects.load(subject), "float32", "eager").rounded(LARGE))


def _large(beta: float, num_groups: int) -> Callable[..., Any]:
    options = {"beta": beta, "num_groups": num_groups}

    def call(a: dict[str, Any]) -> dict[str, Any]:
        scores = (a["logprobs"], a["ref_logprobs"], a["rewards"], a["group_ids"])
        return {
            "gvpo_weights": core.gvpo_weights(*scores, **options),
            "gvpo_loss.loss": core.gvpo_loss(*scores, **options).loss,
            "gvpo_regret.group_series": core.gvpo_regret(*scores, **options).group_series,
            "dpo_loss": core.dpo_loss(*scores, **options),
            "objective_coefficients.grpo": core.objective_coefficients(
                "grpo", *scores[:2], a["old_logprobs"], *scores[2:], **options
            ),
        }

    return call


@pytest.mark.slow_on("mlx", "array-api-strict", "eager-torch", "eager-jax", "compiled")
@pytest.mark.capability("N = 65,536")
@pytest.mark.dtypes("float32")
def test_large(setting: Setting) -> None:
    """65,536 rows in 8,192 groups, shuffled: right, and no array of N x G, whose bits alone would be 64 MiB."""
    a = setting.arrays(LARGE)
    got = setting.function(_large, LARGE.beta, LARGE.num_groups)(a)
    expected = _large_reference(setting.subject.name)
    for name, values in got.items():
        setting.check(f"{LARGE.name} {name}", values, expected[name])
    if setting.mode == "eager":
        largest = setting.subject.largest(_large(LARGE.beta, LARGE.num_groups), a)
        assert largest < 48 * 2**20, f"{setting.subject.name}: {largest / 2**20:.0f} MiB"


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("name", core.OBJECTIVES)
def test_rewards_may_be_integers_and_bools(setting: Setting, name: str) -> None:
    logprobs, ids = setting.array(np.array([-3.0, -1.5, -2.0, -0.25, -4.0])), setting.array(np.array([0, 0, 1, 1, 1]))
    given = np.array([1, 0, 0, 1, 1])
    of = lambda rewards: core.objective_coefficients(
        name, logprobs, 2 * logprobs, logprobs, setting.array(rewards), ids, beta=0.3, lengths=ids + 1
    )
    for kind in (int, bool):
        setting.check(name, of(given.astype(kind)), setting.numpy(of(given.astype(float))))
    weights = {
        "grpo": core.grpo_weights,
        "dr_grpo": core.dr_grpo_weights,
        "rloo": core.rloo_weights,
        "reject_sampling": core.reject_sampling_weights,
    }
    if name in weights:
        expected = setting.numpy(weights[name](setting.array(given.astype(float)), ids))
        for kind in (int, bool):
            setting.check(name, weights[name](setting.array(given.astype(kind)), ids), expected)
