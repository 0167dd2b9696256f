"""Gradients of the losses, by each subject's own differentiation, against derivatives worked out on paper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from compare import assert_close
from quantities import scalars
from reference import gradients, reference
from settings import Setting


def _scalars(beta: float, num_groups: int, *names: str) -> Callable[..., Any]:
    functions = scalars(beta, num_groups)
    return lambda x, a: {name: functions[name](x, a) for name in names}


def _gradients(value_and_grad: Any, beta: float, num_groups: int) -> Callable[..., Any]:
    functions = {name: value_and_grad(f) for name, f in scalars(beta, num_groups).items()}
    return lambda x, a: {name: f(x, a)[1] for name, f in functions.items()}


def _computed(setting: Setting, case: Case) -> dict[str, Any]:
    a, of = setting.arrays(case), setting.subject.value_and_grad
    x = a["logprobs"]
    if setting.mode == "compiled" and setting.subject.name == "torch":
        # torch.compile makes the backward of a forward: one graph for all, differentiated from outside; but not for
        # the ratio, whose infinities would be multiplied by the zeros that stand for the outputs not asked for
        *joint, ratio = sorted(scalars(0.3, 5), key=lambda name: name == "importance_ratio")
        got = {}
        for names in (joint, [ratio]):
            function = setting.function(_scalars, case.beta, case.num_groups, *names)
            got |= {name: of(lambda x, f=function, n=name: f(x, a)[n])(x)[1] for name in names}
        return got
    return setting.function(_gradients, of, case.beta, case.num_groups)(x, a)


def _check(setting: Setting, case: Case) -> None:
    got = _computed(setting, case)
    for name, expected in gradients(setting.rounded(case)).items():
        values = setting.numpy(got[name])
        if case.name == "NaN in one group":  # inside the spoiled group libraries differ in what NaN times 0 leaves
            values = np.where(case.group_ids == 1, expected, values)
        setting.check(f"{case.name} d {name}", setting.array(values), expected, gradient=True)


@pytest.mark.needs("grad")
@pytest.mark.capability("gradients")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name.replace(" ", "-"))
def test_gradients(setting: Setting, case: Case) -> None:
    _check(setting, case)


@pytest.mark.needs("grad")
@pytest.mark.capability("gradients")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float64")
def test_differentiating_through_the_weights_is_another_gradient(setting: Setting) -> None:
    """-sum w log pi with w not constant: its gradient differs from GVPO's, so the weights must be constants."""
    from gvpo_core.objective import centred_rows

    case = CASES[0]
    a = setting.arrays(case)

    def wrong(x: Any) -> Any:
        rows = centred_rows(x, a["ref_logprobs"], a["rewards"], a["group_ids"], case.beta, case.num_groups, None, None)
        return -(rows.weights() / 3 / 3 * x).sum()

    got = setting.numpy(setting.subject.value_and_grad(wrong)(a["logprobs"])[1])
    right = gradients(setting.rounded(case))["gvpo_surrogate"]
    assert np.abs(got - right).max() > 0.1


@pytest.mark.core
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("even", "ragged", "ties", "unscored", "response weights")], ids=str
)
def test_the_derivatives_on_paper_by_differences(case: Case) -> None:
    """The reference's gradients are those of the reference's values: central differences in float64."""
    values = {"gvpo_loss": "gvpo_loss.loss"}
    for name in ("gvpo_loss", "gvpo_regret.second_order", "gvpo_regret.series", "dpo_loss"):
        got = np.zeros(12)
        for i in range(12):
            step = np.zeros(12)
            step[i] = 1e-5
            up, down = (
                reference(replace(case, logprobs=case.logprobs + sign * step))[values.get(name, name)]
                for sign in (1, -1)
            )
            got[i] = (up - down) / 2e-5
        # central differences are exact to step^2 and rounding over the step
        assert_close(got, gradients(case)[name], where=f"{case.name} d {name}", tolerance=1e-8)
