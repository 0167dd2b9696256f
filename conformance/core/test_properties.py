"""Laws that hold for any batch, drawn by hypothesis, on every subject."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cases import Case, permute
from compare import assert_close, tolerance_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from quantities import everything
from settings import Setting

import gvpo_core as core

pytestmark = [
    pytest.mark.modes("eager"),
    pytest.mark.dtypes("float64"),
    pytest.mark.capability("properties"),
]
bounded = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ROWS = 12


@st.composite
def batches(draw: st.DrawFn, rows: int = ROWS) -> Case:
    numbers = lambda low, high: arrays(
        np.float64, rows, elements=st.integers(low * 16, high * 16).map(lambda x: x / 16)
    )
    logprobs = draw(numbers(-40, 0))
    return Case(
        "drawn",
        logprobs=logprobs,
        ref_logprobs=logprobs + draw(numbers(-3, 3)),
        old_logprobs=logprobs + draw(numbers(-1, 1)),
        rewards=draw(numbers(-2, 2)),
        group_ids=draw(arrays(np.int64, rows, elements=st.integers(0, 4))),
        valid=draw(arrays(np.bool_, rows)) if draw(st.booleans()) else None,
        beta=0.375,
    )


def _everything(beta: float, num_groups: int) -> Callable[..., Any]:
    return lambda arrays: everything(arrays, beta=beta, num_groups=num_groups)


def compute(setting: Setting, case: Case) -> dict[str, np.ndarray]:
    if setting.subject.name == "jax":  # whose eager operations, some thousands a call, are slow to dispatch
        setting = replace(setting, mode="compiled")
    got = setting.function(_everything, case.beta, case.num_groups)(setting.arrays(case))
    return {name: setting.numpy(x) for name, x in got.items()}


def check(setting: Setting, name: str, got: np.ndarray, expected: np.ndarray) -> None:
    # two computations are compared, each with its own rounding
    tolerance = 4 * tolerance_of(setting.subject.name, setting.dtype, name)
    where = f"{setting.subject.name} {setting.dtype} eager drawn {name}"
    assert_close(got, expected, where=where, tolerance=tolerance)


@pytest.mark.slow_on("jax")
@bounded
@given(case=batches())
def test_weights_sum_to_zero_in_each_group(setting: Setting, case: Case) -> None:
    got = compute(setting, case)
    for name in ("gvpo_weights", "gvpo_coefficients", "grpo_weights.kl", "rloo_weights.kl", "dpo_weights"):
        sums = [got[name][case.group_ids == g].sum() for g in range(5)]
        check(setting, name, np.array(sums), np.zeros(5))


# MaxRL divides by the mean reward; mirror descent does not centre the log-ratio.
_NOT_INVARIANT = ("objective_coefficients.maxrl", "objective_coefficients.mirror_descent")


@bounded
@given(case=batches(), shift=arrays(np.float64, 5, elements=st.integers(-8, 8).map(float)))
def test_a_constant_in_a_group_changes_nothing(setting: Setting, case: Case, shift: np.ndarray) -> None:
    """Added to the rewards, or to the reference's log-probabilities (log Z), of a whole group."""
    by_row = shift[case.group_ids]
    before = compute(setting, case)
    for field in ("rewards", "ref_logprobs"):
        after = compute(setting, replace(case, **{field: getattr(case, field) + by_row}))
        for name in before:
            if name not in ("bradley_terry_loss", "clipped_ratio_weights", *_NOT_INVARIANT):
                check(setting, name, after[name], before[name])


@bounded
@given(case=batches(), order=st.permutations(range(ROWS)))
def test_order_of_rows(setting: Setting, case: Case, order: list[int]) -> None:
    before, after = compute(setting, case), compute(setting, permute(case, np.array(order)))
    for name, values in before.items():
        per_row = values.shape == (ROWS,)
        check(setting, name, after[name], values[np.array(order)] if per_row else values)


@pytest.mark.slow_on("jax")
@bounded
@given(case=batches(rows=8))
def test_padding_equals_slicing(setting: Setting, case: Case) -> None:
    """Four rows of rubbish that only pad."""
    pad = lambda x, value: np.concatenate([x, np.full(4, value)])
    padded = replace(
        case,
        logprobs=pad(case.logprobs, np.nan),
        ref_logprobs=pad(case.ref_logprobs, np.inf),
        old_logprobs=pad(case.old_logprobs, 0.0),
        rewards=pad(case.rewards, 1e6),
        group_ids=pad(case.group_ids, 0),
        valid=pad(np.ones(8, bool) if case.valid is None else case.valid, False),
    )
    sliced, got = compute(setting, case), compute(setting, padded)
    for name, values in sliced.items():
        if values.shape == (8,):
            assert name == "importance_ratio" or (got[name][8:] == 0).all(), name
            check(setting, name, got[name][:8], values)
        else:
            check(setting, name, got[name], values)


@pytest.mark.slow_on("jax")
@bounded
@given(first=batches(rows=6), second=batches(rows=6))
def test_sub_batches_of_whole_groups(setting: Setting, first: Case, second: Case) -> None:
    """Computed apart and weighted by their counts of groups, two batches give what one batch of both gives."""
    join = lambda name: np.concatenate([first.arrays[name], second.arrays[name]])
    mask = lambda c: np.ones(6, bool) if c.valid is None else c.valid
    both = replace(
        first,
        **{name: join(name) for name in first.arrays},
        group_ids=np.concatenate([first.group_ids, second.group_ids + 5]),
        valid=np.concatenate([mask(first), mask(second)]),
        num_groups=10,
    )
    parts, whole = [compute(setting, c) for c in (first, second)], compute(setting, both)
    name = "gvpo_loss.group_loss"
    check(setting, name, whole[name], np.concatenate([p[name] for p in parts]))
    counts = [float(p["gvpo_loss.counted_groups"]) for p in parts]
    total = max(sum(counts), 1)
    for name in ("gvpo_coefficients", "objective_coefficients.rloo", "objective_coefficients.grpo"):
        joined = np.concatenate([n * p[name] for n, p in zip(counts, parts, strict=True)]) / total
        check(setting, name, whole[name], joined)
    loss = sum(n * p["gvpo_loss.loss"] for n, p in zip(counts, parts, strict=True)) / total
    check(setting, "gvpo_loss.loss", whole["gvpo_loss.loss"], loss)


@bounded
@given(case=batches(), factor=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_units(setting: Setting, case: Case, factor: float) -> None:
    """Reward and beta in other units: weights and regret scale with them, the loss with their square."""
    a, b = setting.arrays(case), setting.arrays(replace(case, rewards=case.rewards * factor))
    run = lambda f, x, beta: f(
        x["logprobs"], x["ref_logprobs"], x["rewards"], x["group_ids"], beta=beta, num_groups=5, valid=x["valid"]
    )
    for function, power in ((core.gvpo_weights, 1), (core.gvpo_coefficients, 1)):
        before, after = run(function, a, case.beta), run(function, b, case.beta * factor)
        check(setting, function.__name__, setting.numpy(after), setting.numpy(before) * factor**power)
    before, after = run(core.gvpo_loss, a, case.beta), run(core.gvpo_loss, b, case.beta * factor)
    check(setting, "loss", setting.numpy(after.loss), setting.numpy(before.loss) * factor**2)
    before, after = run(core.gvpo_regret, a, case.beta), run(core.gvpo_regret, b, case.beta * factor)
    check(setting, "series", setting.numpy(after.series), setting.numpy(before.series) * factor)
