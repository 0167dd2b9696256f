"""Each equation 1-21 and theorem of the paper that says something computable, named after it; docs/paper.md maps them.

The policy is a softmax table over few responses, so every expectation is an exact sum. A distribution with rational
probabilities is a group in which each response stands as often as its probability says.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cases import CASES, draw
from compare import assert_close
from reference import members

import gvpo_core as core

pytestmark = pytest.mark.core

BETA = 0.7
REF = np.array([1, 2, 3, 2]) / 8  # pi_ref, rational
REWARD = np.array([0.3, -1.0, 0.8, 2.0])
OPTIMAL = REF * np.exp(REWARD / BETA) / (REF * np.exp(REWARD / BETA)).sum()  # Eq. 6
THETA = np.array([0.4, -0.2, 0.1, -0.9])
STARTS = [np.zeros(4), THETA, np.array([3.0, -3.0, 0, 1]), np.array([-2.0, 2.0, 2.0, -4.0])]


def log_policy(theta: np.ndarray) -> np.ndarray:
    return theta - np.log(np.exp(theta - theta.max()).sum()) - theta.max()


def jacobian(theta: np.ndarray) -> np.ndarray:
    """[y, j] = d log pi(y) / d theta_j of the softmax table."""
    return np.eye(len(theta)) - np.exp(log_policy(theta))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def objective(p: np.ndarray) -> float:
    """J of Eq. 5."""
    return float((p * REWARD).sum() - BETA * kl(p, REF))


def differences(function: Callable[[np.ndarray], float], theta: np.ndarray) -> np.ndarray:
    steps = 1e-6 * np.eye(len(theta))
    return np.array([(function(theta + h) - function(theta - h)) / 2e-6 for h in steps])


def close(got: object, expected: object, tolerance: float = 1e-12) -> None:
    assert_close(np.asarray(got), np.asarray(expected), where="numpy float64 eager", tolerance=tolerance)


def group(rows: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arguments of the core for one group of the responses `rows`."""
    return log_policy(theta)[rows], np.log(REF)[rows], REWARD[rows], np.zeros(len(rows), int)


def rows_of(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def expected_loss(theta: np.ndarray, sampler: np.ndarray) -> float:
    """Eq. 14 by its sum over all responses."""
    implicit = BETA * (log_policy(theta) - np.log(REF))
    d = (implicit - (sampler * implicit).sum()) - (REWARD - (sampler * REWARD).sum())
    return float((sampler * d**2).sum())


# Eq. 1-4, 8, 9: the losses whose gradients are weighted sums


def test_eq_1_sft() -> None:
    rows = np.array([2, 0, 2])
    gradient = differences(lambda t: -log_policy(t)[rows].sum(), THETA)
    close(-core.sft_weights(log_policy(THETA)[rows]) @ jacobian(THETA)[rows], gradient, 1e-8)


def test_eq_2_reject_sampling() -> None:
    rows = np.array([1, 3, 0])  # the best is response 3
    gradient = differences(lambda t: -log_policy(t)[3], THETA)
    weights = core.reject_sampling_weights(REWARD[rows], np.zeros(3, int))
    close(-weights @ jacobian(THETA)[rows], gradient, 1e-8)


def test_eq_3_grpo() -> None:
    rewards, ids = np.array([1.0, 3.0, 8.0, 5.0, 5.0]), np.array([0, 0, 0, 1, 1])
    population = core.grpo_weights(rewards, ids, eps=0, ddof=0)  # mean 4, variance (9 + 1 + 16)/3
    close(population, [*np.array([-3, -1, 4]) / math.sqrt(26 / 3), 0, 0])
    sample = core.grpo_weights(rewards, ids, eps=0)
    close(sample, [*np.array([-3, -1, 4]) / math.sqrt(13), 0, 0])


def test_eq_4_bradley_terry() -> None:
    chosen, rejected = np.array([1.0, -2.0, 500.0]), np.array([0.0, 1.0, -500.0])
    expected = -np.log(1 / (1 + np.exp(-np.array([1.0, -3.0])))).sum() / 3  # the third pair adds log 1
    close(core.bradley_terry_loss(chosen, rejected), expected)


def test_eq_8_dpo() -> None:
    rows = np.array([1, 2, 3])  # rewards -1, 0.8, 2: response 3 against response 1
    s = log_policy(THETA) - np.log(REF)
    expected = -math.log(1 / (1 + math.exp(-BETA * (s[3] - s[1]))))
    close(core.dpo_loss(*group(rows, THETA), beta=BETA), expected)


def test_eq_9_dpo_weights_times_beta_are_the_gradient_of_eq_8() -> None:
    rows = np.array([1, 2, 3])
    weights = core.dpo_weights(*group(rows, THETA), beta=BETA)
    gradient = differences(lambda t: float(core.dpo_loss(*group(rows, t), beta=BETA)), THETA)
    close(-BETA * weights @ jacobian(THETA)[rows], gradient, 1e-8)


# Eq. 5-7: the optimum


def test_eq_5_is_maximal_at_eq_6() -> None:
    rng = np.random.default_rng(0)
    for p in rng.dirichlet(np.ones(4), 200):
        assert objective(p) < objective(OPTIMAL)
    close(objective(OPTIMAL), BETA * math.log((REF * np.exp(REWARD / BETA)).sum()))


def test_eq_5_regret_series_is_exactly_what_is_left_to_gain() -> None:
    counts = [3, 2, 1, 2]
    policy = np.array(counts) / 8
    regret = core.gvpo_regret(*group(rows_of(counts), np.log(policy)), beta=BETA)
    close(regret.series, objective(OPTIMAL) - objective(policy))
    close(regret.series, BETA * kl(policy, OPTIMAL))


def test_eq_5_regret_second_order_is_exact_to_second_order() -> None:
    """Half the distance to pi*, an eighth of the error: what is left is of third order."""
    counts = np.array([3, 2, 1, 2])
    policy = counts / 8
    errors = []
    for scale in (0.04, 0.02, 0.01):
        # a reward for which pi* is this close to the policy
        reward = BETA * (np.log(policy / REF) + scale * np.array([0.3, -1.0, 0.8, 3.0]))
        rows = rows_of(list(counts))
        regret = core.gvpo_regret(np.log(policy)[rows], np.log(REF)[rows], reward[rows], np.zeros(8, int), beta=BETA)
        population = 7 / 8  # the sample variance divides by k - 1, the population's by k
        errors.append(abs(float(regret.series - population * regret.second_order)))
    assert all(7 < a / b < 9 for a, b in itertools.pairwise(errors))


def test_eq_6_and_7_weights_vanish_at_the_optimum() -> None:
    log_z = math.log((REF * np.exp(REWARD / BETA)).sum())
    close(BETA * np.log(OPTIMAL / REF) + BETA * log_z, REWARD)
    at_optimum = group(np.arange(4), np.log(OPTIMAL))
    close(core.gvpo_weights(*at_optimum, beta=BETA), np.zeros(4))
    close(core.gvpo_loss(*at_optimum, beta=BETA).loss, 0)


# Eq. 10-13: the gradient

ROWS = np.array([0, 1, 1, 3])


def test_eq_10_the_reference_does_not_move_the_gradient() -> None:
    weights = core.gvpo_weights(*group(ROWS, THETA), beta=BETA)
    plain = differences(lambda t: -(weights * log_policy(t)[ROWS]).sum(), THETA)
    ratio = differences(lambda t: -(weights * (log_policy(t) - np.log(REF))[ROWS]).sum(), THETA)
    close(plain, ratio, 1e-8)


def test_eq_11_the_partition_function_cancels() -> None:
    arguments = group(ROWS, THETA)
    weights = core.gvpo_weights(*arguments, beta=BETA)
    close(weights.sum(), 0)
    shifted = (arguments[0], arguments[1] - 12.5, *arguments[2:])  # beta log Z, the same for the whole group
    close(core.gvpo_weights(*shifted, beta=BETA), weights)


def test_eq_12_weights() -> None:
    s, reward = (log_policy(THETA) - np.log(REF))[ROWS], REWARD[ROWS]
    expected = [(r - sum(reward) / 4) - BETA * (x - sum(s) / 4) for r, x in zip(reward, s, strict=True)]
    close(core.gvpo_weights(*group(ROWS, THETA), beta=BETA), expected)


def test_eq_13_is_the_gradient_of_a_mean_squared_error() -> None:

    def squares(theta: np.ndarray) -> float:
        implicit = BETA * (log_policy(theta) - np.log(REF))[ROWS]
        return float((((implicit - implicit.mean()) - (REWARD[ROWS] - REWARD[ROWS].mean())) ** 2).sum())

    weights = core.gvpo_weights(*group(ROWS, THETA), beta=BETA)
    close(-weights @ jacobian(THETA)[ROWS], differences(squares, THETA) / (2 * BETA), 1e-8)


def test_eq_13_differentiating_through_the_weights_is_wrong() -> None:
    right = -core.gvpo_weights(*group(ROWS, THETA), beta=BETA) @ jacobian(THETA)[ROWS]
    through = differences(lambda t: -(core.gvpo_weights(*group(ROWS, t), beta=BETA) * log_policy(t)[ROWS]).sum(), THETA)
    assert np.abs(right - through).max() > 0.1


# Theorems 3.1-3.4


def descend(theta: np.ndarray, counts: list[int], steps: int = 4000) -> np.ndarray:
    """Exact gradient descent on Eq. 14 with pi_s = counts / sum, along the core's coefficients."""
    rows = rows_of(counts)
    for _ in range(steps):
        c = core.gvpo_coefficients(*group(rows, theta), beta=BETA)
        if np.abs(c).max() < 1e-7:
            break
        theta = theta + 1.5 * c @ jacobian(theta)[rows]
    return theta


@pytest.mark.parametrize("counts", [[1, 2, 3, 2], [5, 1, 1, 1], [2, 2, 2, 2]], ids=["ref", "skewed", "uniform"])
def test_theorem_3_1_and_corollary_3_2_one_minimiser(counts: list[int]) -> None:
    """From every start, for pi_s = pi_ref (3.1) and others with its support (3.2), descent ends at pi* alone."""
    for start in STARTS:
        assert expected_loss(start, np.array(counts) / sum(counts)) > 1e-3
        end = np.exp(log_policy(descend(start, counts)))
        assert kl(end, OPTIMAL) < 1e-10, (start, end)
    at_optimum = core.gvpo_coefficients(*group(rows_of(counts), np.log(OPTIMAL)), beta=BETA)
    close(at_optimum, np.zeros(sum(counts)))


def test_corollary_3_2_needs_the_support() -> None:
    """A sampler that never draws response 1 cannot tell pi* from a policy that differs there."""
    other = np.array([OPTIMAL[0], 3 * OPTIMAL[1], OPTIMAL[2], OPTIMAL[3]])
    other /= other.sum()
    assert kl(other, OPTIMAL) > 1e-3
    close(core.gvpo_loss(*group(rows_of([2, 0, 1, 1]), np.log(other)), beta=BETA).loss, 0)


def enumerate_samples(sizes: list[int], p: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every sample of every size in `sizes`, each a group of one call: (group losses, probabilities)."""
    samples = [y for k in sizes for y in itertools.product(range(len(p)), repeat=k)]
    rows = np.array([y for sample in samples for y in sample])
    ids = np.repeat(np.arange(len(samples)), [len(sample) for sample in samples])
    losses = core.gvpo_loss(log_policy(theta)[rows], np.log(REF)[rows], REWARD[rows], ids, beta=BETA).group_loss
    return losses, np.array([np.prod(p[list(sample)]) for sample in samples])


SAMPLER = np.array([0.4, 0.15, 0.1, 0.35])


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_theorem_3_3_unbiased(k: int) -> None:
    """Eq. 15 over all |Y|^k samples, weighted by their probability, is Eq. 14."""
    losses, probabilities = enumerate_samples([k], SAMPLER, THETA)
    close(probabilities.sum(), 1)
    close((probabilities * losses).sum(), expected_loss(THETA, SAMPLER))


def test_theorem_3_3_consistent() -> None:
    """The variance of Eq. 15 is (mu_4 - (k-3)/(k-1) sigma^4)/k exactly, so it falls to zero as k grows."""
    d = REWARD - BETA * (log_policy(THETA) - np.log(REF))
    d = d - (SAMPLER * d).sum()
    fourth, second = (SAMPLER * d**4).sum(), (SAMPLER * d**2).sum()
    variances = []
    for k in (2, 3, 4, 5, 6):
        losses, p = enumerate_samples([k], SAMPLER, THETA)
        variances.append(float((p * (losses - (p * losses).sum()) ** 2).sum()))
        close(variances[-1], (fourth - (k - 3) / (k - 1) * second**2) / k)
    assert all(a > b for a, b in itertools.pairwise(variances))


def test_corollary_3_4_ragged_groups() -> None:
    """Two prompts with 2 and 4 responses: the mean over both of Eq. 16, over all pairs of samples, is Eq. 14's."""
    other = np.array([0.25, 0.25, 0.4, 0.1])
    first, p = enumerate_samples([2], SAMPLER, THETA)
    second, q = enumerate_samples([4], other, THETA)
    rng = np.random.default_rng(1)
    for i, j in zip(rng.integers(0, len(first), 5), rng.integers(0, len(second), 5), strict=True):
        a = list(itertools.product(range(4), repeat=2))[i]
        b = list(itertools.product(range(4), repeat=4))[j]
        rows, ids = np.array(a + b), np.array([0, 0, 1, 1, 1, 1])
        both = core.gvpo_loss(log_policy(THETA)[rows], np.log(REF)[rows], REWARD[rows], ids, beta=BETA).loss
        close(both, (first[i] + second[j]) / 2)
    mean = (p[:, None] * q[None, :] * (first[:, None] + second[None, :]) / 2).sum()
    close(mean, (expected_loss(THETA, SAMPLER) + expected_loss(THETA, other)) / 2)


def test_corollary_3_4_a_response_without_a_score_leaves() -> None:
    case = draw("one leaves", (4, 3), seed=21, groups=2)
    rewards = case.rewards.copy()
    rewards[2] = np.nan
    scores = (case.logprobs, case.ref_logprobs)
    left = core.gvpo_weights(*scores, rewards, case.group_ids, beta=BETA)
    keep = np.array([0, 1, 3, 4, 5, 6])
    sliced = core.gvpo_weights(scores[0][keep], scores[1][keep], rewards[keep], case.group_ids[keep], beta=BETA)
    close(left[keep], sliced)
    assert left[2] == 0
    close(left[:4].sum(), 0)


# Eq. 14-17: the loss


def test_eq_14_by_repetition_of_responses() -> None:
    counts = [5, 1, 1, 1]
    loss = core.gvpo_loss(*group(rows_of(counts), THETA), beta=BETA).loss
    close(loss * 7 / 8, expected_loss(THETA, np.array(counts) / 8))


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=["eq-15", "eq-16"])
def test_eq_15_and_16_loss(case) -> None:  # CASES[0] has groups of one size, CASES[1] ragged ones
    total, groups = 0.0, members(case, least=2)
    for rows in groups.values():
        d = case.beta * (case.logprobs - case.ref_logprobs)[rows] - case.rewards[rows]
        total += np.var(d, ddof=1)
    got = core.gvpo_loss(case.logprobs, case.ref_logprobs, case.rewards, case.group_ids, beta=case.beta, num_groups=5)
    close(got.loss, total / len(groups))


def test_eq_17_split() -> None:
    for beta in (0.0, 0.3, 1.0):
        case = replace(CASES[1], beta=beta)
        got = core.gvpo_loss(case.logprobs, case.ref_logprobs, case.rewards, case.group_ids, beta=beta)
        close(got.loss, got.implicit_variance + got.reward_variance - 2 * got.covariance)
    # beta = 1: the gradient is that of -2 [Cov(R, log pi) + Cov(log pi, log pi_ref) - Var(log pi) / 2]
    rows = np.array([0, 1, 1, 2, 3])

    def terms(theta: np.ndarray) -> float:
        now, ref, reward = (np.asarray(x)[rows] for x in (log_policy(theta), np.log(REF), REWARD))
        cov = lambda a, b: ((a - a.mean()) * (b - b.mean())).sum() / 4
        return float(-2 * (cov(reward, now) + cov(now, ref) - 0.5 * cov(now, now)))

    c = core.gvpo_coefficients(*group(rows, THETA), beta=1.0)
    close(-2 * c @ jacobian(THETA)[rows], differences(terms, THETA), 1e-8)


# Eq. 18-21: the policy gradient (beta = 1 in the paper's text)

COUNTS = [3, 2, 1, 2]
POLICY = np.log(np.array(COUNTS) / 8)


def j_of(theta: np.ndarray) -> float:
    p = np.exp(log_policy(theta))
    return float((p * (REWARD - np.log(p / REF))).sum())


def test_eq_18_policy_gradient() -> None:
    p = np.exp(POLICY)
    exact = (p * (REWARD - np.log(p / REF) - 1)) @ jacobian(POLICY)
    close(exact, differences(j_of, POLICY), 1e-8)
    rows = rows_of(COUNTS)  # Dr. GRPO with the KL penalty in the reward is Eq. 18 with a baseline
    weights = core.dr_grpo_weights(
        REWARD[rows], np.zeros(8, int), beta=1.0, logprobs=POLICY[rows], ref_logprobs=np.log(REF)[rows]
    )
    close(weights @ jacobian(POLICY)[rows] / 8, exact)


def test_eq_19_importance_sampling() -> None:
    rows, old = rows_of(COUNTS), POLICY
    now = POLICY + np.array([0.1, -0.3, 0.2, 0.5])
    ratio = core.importance_ratio(log_policy(now)[rows], old[rows])
    p = np.exp(log_policy(now))
    value = (REWARD - np.log(p / REF) - 1)[rows]
    close((ratio * value) @ jacobian(now)[rows] / 8, (p * (REWARD - np.log(p / REF) - 1)) @ jacobian(now))
    free = core.clipped_ratio_weights(log_policy(now)[rows], old[rows], value, clip=float("inf"))
    close(free, ratio * value)


def test_eq_19_clip_is_the_gradient_of_ppos_objective() -> None:
    rng = np.random.default_rng(5)
    old, advantage = rng.normal(-5, 1, 64), rng.normal(0, 1, 64)
    now = old + rng.normal(0, 0.5, 64)

    def ppo(x: np.ndarray) -> np.ndarray:
        rho = np.exp(x - old)
        return np.minimum(rho * advantage, np.clip(rho, 0.8, 1.2) * advantage)

    expected = (ppo(now + 1e-6) - ppo(now - 1e-6)) / 2e-6
    got = core.clipped_ratio_weights(now, old, advantage, clip=0.2)
    close(got, expected, 1e-8)
    assert (got == 0).sum() > 5 and (got != 0).sum() > 5


def test_eq_20_a_baseline_changes_nothing() -> None:
    p = np.exp(POLICY)
    value = REWARD - np.log(p / REF)
    centred = (p * (value - (p * value).sum())) @ jacobian(POLICY)
    close(centred, differences(j_of, POLICY), 1e-8)


def test_eq_21_gvpo_on_policy_is_the_policy_gradient() -> None:
    rows = rows_of(COUNTS)
    now, ref, rewards, ids = group(rows, POLICY)
    c = core.gvpo_coefficients(now, ref, rewards, ids, beta=1.0)
    close(c @ jacobian(POLICY)[rows] * 7 / 8, differences(j_of, POLICY), 1e-8)
    close(core.objective_coefficients("rloo", now, ref, now, rewards, ids, beta=1.0), c)


def test_the_authors_scale() -> None:
    """Their released loss is half of Eq. 15: its gradient is -sum beta w/(k-1) grad log pi, beta times our step."""
    released = differences(lambda t: 0.5 * float(core.gvpo_loss(*group(ROWS, t), beta=BETA).loss), THETA)
    weights = core.gvpo_weights(*group(ROWS, THETA), beta=BETA)
    ours = core.gvpo_coefficients(*group(ROWS, THETA), beta=BETA)
    close(-BETA * weights / 3 @ jacobian(THETA)[ROWS], released, 1e-8)
    close(BETA * weights / 3, BETA * ours)
