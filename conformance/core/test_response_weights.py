"""GVPO++ (arXiv 2609.21432) on a softmax table: the optimum under response weights, and distillation from a teacher.

Expectations are exact: a sampler with rational probabilities is a group that holds each response as often as its
probability says.
"""

import itertools

import numpy as np
import pytest
from compare import assert_close
from reference import shift

import gvpo_core as core

pytestmark = pytest.mark.core

BETA = 0.7
REF = np.array([1, 2, 3, 2]) / 8
REWARD = np.array([0.3, -1.0, 0.8, 2.0])
LENGTHS = np.array([1, 4, 9, 2])
STARTS = [np.array([3.0, -3.0, 0, 1]), np.array([-2.0, 2.0, 2.0, -4.0])]
SAMPLERS = {"reference": [1, 2, 3, 2], "skewed": [5, 1, 1, 1], "uniform": [2, 2, 2, 2]}


def log_policy(theta: np.ndarray) -> np.ndarray:
    return theta - np.log(np.exp(theta - theta.max()).sum()) - theta.max()


def optimum(ref: np.ndarray, reward: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """pi_ref exp((R + c) / (beta f)), c by bisection."""
    low, high = -100.0, 100.0
    for _ in range(200):
        c = (low + high) / 2
        total = (ref * np.exp(np.minimum((reward + c) / (BETA * factors), 700))).sum()
        low, high = (low, c) if total > 1 else (c, high)
    return ref * np.exp((reward + low) / (BETA * factors))


def descend(
    theta: np.ndarray, counts: list[int], ref: np.ndarray, reward: np.ndarray, factors: np.ndarray
) -> np.ndarray:
    """Gradient descent along the core's coefficients, to a vanishing step."""
    rows = np.repeat(np.arange(4), counts)
    ids = np.zeros(len(rows), int)
    for _ in range(20_000):
        c = core.gvpo_coefficients(
            log_policy(theta)[rows], np.log(ref)[rows], reward[rows], ids, beta=BETA, response_weights=factors[rows]
        )
        if np.abs(c).max() < 1e-7:
            break
        theta = theta + 2.5 * c @ (np.eye(4) - np.exp(log_policy(theta)))[rows]
    return np.exp(log_policy(theta))


@pytest.mark.slow_on("skewed")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_the_minimiser_is_the_weighted_optimum(sampler: str, exponent: float) -> None:
    """Wherever it starts and whoever samples, descent ends at pi_ref exp((R + c) / (beta f)) alone."""
    factors = LENGTHS**-exponent
    expected = optimum(REF, REWARD, factors)
    assert abs(expected.sum() - 1) < 1e-12
    for start in STARTS:
        end = descend(start, SAMPLERS[sampler], REF, REWARD, factors)
        assert_close(end, expected, where=f"{sampler} {exponent}", tolerance=1e-5)
    plain = optimum(REF, REWARD, np.ones(4))
    assert np.abs(plain - expected).max() > 0.05, "the weights must change the optimum, or nothing was tested"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_distillation_ends_at_the_teacher_for_any_weights(sampler: str) -> None:
    """R = 0 with the teacher instead of the reference: the unique minimum is the teacher itself."""
    teacher = np.array([0.1, 0.4, 0.2, 0.3])
    for factors in (np.ones(4), LENGTHS**-1.0, np.array([1.5, 0.3, 1.0, 2.0])):
        end = descend(STARTS[0], SAMPLERS[sampler], teacher, np.zeros(4), factors / factors.max())
        assert_close(end, teacher, where=f"{sampler} {factors}", tolerance=1e-5)


def test_the_step_is_the_gradient_of_the_loss() -> None:
    rows, ids = np.array([0, 1, 1, 3, 2]), np.zeros(5, int)
    factors = LENGTHS[rows] ** -0.5
    theta = np.array([0.4, -0.2, 0.1, -0.9])
    options = {"beta": BETA, "response_weights": factors}

    def loss(t: np.ndarray) -> float:
        return float(core.gvpo_loss(log_policy(t)[rows], np.log(REF)[rows], REWARD[rows], ids, **options).loss)

    gradient = np.array([(loss(theta + h) - loss(theta - h)) / 2e-6 for h in 1e-6 * np.eye(4)])
    c = core.gvpo_coefficients(log_policy(theta)[rows], np.log(REF)[rows], REWARD[rows], ids, **options)
    jacobian = (np.eye(4) - np.exp(log_policy(theta)))[rows]
    assert_close(-2 * BETA * c @ jacobian, gradient, where="gradient", tolerance=1e-8)


def test_regret_is_what_the_weighted_objective_still_lacks() -> None:
    """J(pi) = E[R - beta f (s - 1)]; J(pi*) - J(pi) by its sums over all responses."""
    counts = [3, 2, 1, 2]
    policy, factors = np.array(counts) / 8, LENGTHS**-0.5
    best = optimum(REF, REWARD, factors)

    def j(p: np.ndarray) -> float:
        return float((p * (REWARD - BETA * factors * (np.log(p / REF) - 1))).sum())

    for p in np.random.default_rng(0).dirichlet(np.ones(4), 200):
        assert j(p) < j(best)
    rows = np.repeat(np.arange(4), counts)
    scores = (np.log(policy)[rows], np.log(REF)[rows], REWARD[rows], np.zeros(8, int))
    regret = core.gvpo_regret(*scores, beta=BETA, response_weights=factors[rows])
    assert_close(np.asarray(regret.series), np.asarray(j(best) - j(policy)), where="regret", tolerance=1e-12)


def test_regret_second_order_is_exact_to_second_order() -> None:
    """Half the distance to the optimum, an eighth of the error."""
    counts = np.array([3, 2, 1, 2])
    policy, factors = counts / 8, LENGTHS**-0.5
    rows, errors = np.repeat(np.arange(4), counts), []
    for scale in (0.04, 0.02, 0.01):
        reward = BETA * factors * (np.log(policy / REF) + scale * np.array([0.3, -1.0, 0.8, 3.0]))
        scores = (np.log(policy)[rows], np.log(REF)[rows], reward[rows], np.zeros(8, int))
        regret = core.gvpo_regret(*scores, beta=BETA, response_weights=factors[rows])
        errors.append(abs(float(regret.series - 7 / 8 * regret.second_order)))
    assert all(7 < a / b < 9 for a, b in itertools.pairwise(errors)), errors


def test_weights_of_one_change_nothing() -> None:
    rng = np.random.default_rng(3)
    scores = (rng.normal(size=9), rng.normal(size=9), rng.normal(size=9), np.repeat([0, 1, 2], 3))
    for function in (core.gvpo_weights, core.gvpo_coefficients):
        plain = function(*scores, beta=BETA)
        assert np.array_equal(function(*scores, beta=BETA, response_weights=np.ones(9)), plain)
    plain, weighted = (core.gvpo_regret(*scores, beta=BETA, **o) for o in ({}, {"response_weights": np.ones(9)}))
    for a, b in zip(plain, weighted, strict=True):
        assert_close(b, np.asarray(a), where="regret", tolerance=1e-12)


def test_newton_finds_the_shift_of_very_unequal_lengths() -> None:
    """Lengths from 1 to 100,000 at exponent 1, where the function is farthest from a line."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        k = int(rng.integers(2, 65))
        lengths = np.exp(rng.uniform(0, np.log(1e5), k))
        reward, ids = rng.normal(size=k), np.zeros(k, int)
        logprobs = rng.normal(size=k) * 3
        options = {"beta": 0.1, "response_weights": 1 / lengths}
        w = core.gvpo_weights(logprobs, np.zeros(k), reward, ids, **options)
        c = shift(list(map(float, w)), list(1 / lengths), 0.1)
        u = (w - c) * lengths / 0.1
        expected = 0.1 * float((np.expm1(u) - u) @ (1 / lengths)) / k
        got = core.gvpo_regret(logprobs, np.zeros(k), reward, ids, **options).series
        assert_close(np.asarray(got), np.asarray(expected), where=f"k = {k}", tolerance=1e-6)
