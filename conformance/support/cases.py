"""The cases, as data: drawn ones that the reference works out, and small ones worked by hand.

All drawn cases have N = 12 rows and num_groups = 5, so that a compiler meets one shape; groups may be empty.
"""

from dataclasses import dataclass, field, replace

import numpy as np

NAN, INF = float("nan"), float("inf")
N, G = 12, 5


@dataclass(frozen=True)
class Case:
    name: str
    logprobs: np.ndarray
    ref_logprobs: np.ndarray
    old_logprobs: np.ndarray
    rewards: np.ndarray
    group_ids: np.ndarray
    valid: np.ndarray | None = None
    response_weights: np.ndarray | None = None
    beta: float = 0.3
    num_groups: int = G
    lengths: np.ndarray | None = None  # tokens; None: 1, 2, 3, 4, 1, 2, ...

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is turned into arrays of a subject."""
        floats = {"logprobs", "ref_logprobs", "old_logprobs", "rewards"}
        if self.response_weights is not None:
            floats.add("response_weights")
        lengths = 1.0 + np.arange(len(self.rewards)) % 4 if self.lengths is None else self.lengths
        return {name: getattr(self, name) for name in sorted(floats)} | {"lengths": lengths}


def draw(name: str, sizes: tuple[int, ...], *, seed: int, groups: int = G) -> Case:
    """A case with plausible numbers: log-probabilities of whole responses, rewards about 1, ratios about 1."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    logprobs = -rng.gamma(4.0, 3.0, n)
    return Case(
        name,
        logprobs=logprobs,
        ref_logprobs=logprobs - rng.normal(0, 1.0, n),
        old_logprobs=logprobs - rng.normal(0, 0.3, n),
        rewards=rng.normal(1.0, 1.0, n),
        group_ids=np.repeat(np.arange(len(sizes)), sizes),
        num_groups=groups,
    )


def _at(values: np.ndarray, rows: dict[int, float]) -> np.ndarray:
    values = values.copy()
    for row, value in rows.items():
        values[row] = value
    return values


def permute(case: Case, order: np.ndarray) -> Case:
    """The same rows in another order."""
    moved = {name: x[order] for name, x in case.arrays.items()}
    valid = None if case.valid is None else case.valid[order]
    return replace(case, **moved, group_ids=case.group_ids[order], valid=valid)


def _drawn() -> list[Case]:
    even = draw("even", (4, 4, 4), seed=1)
    ragged = draw("ragged", (5, 2, 1, 4), seed=2)
    shuffled = permute(ragged, np.random.default_rng(3).permutation(N))
    mask = np.ones(N, bool)
    mask[[2, 5, 6, 11]] = False
    padding = draw("padding", (4, 4, 4), seed=4)
    padding = replace(
        padding,
        valid=mask,
        logprobs=_at(padding.logprobs, {2: NAN, 5: -INF, 6: 3e4}),
        ref_logprobs=_at(padding.ref_logprobs, {2: INF, 11: NAN}),
        rewards=_at(padding.rewards, {5: INF, 6: NAN}),
        lengths=np.array([1, 2, 0, 4, 5, NAN, -1, 8, 3, 3, 1, INF]),
    )
    unscored = draw("unscored", (4, 4, 2, 2), seed=5)
    unscored = replace(unscored, rewards=_at(unscored.rewards, {0: NAN, 5: NAN, 6: NAN, 9: NAN, 10: NAN, 11: NAN}))
    ties = replace(draw("ties", (4, 4, 4), seed=6), rewards=np.array([1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0], float))
    huge = draw("huge log-ratio", (4, 4, 4), seed=7)
    huge = replace(
        huge,
        logprobs=_at(huge.logprobs, {1: -8192.0}),
        old_logprobs=_at(huge.old_logprobs, {1: -8192.0}),
    )
    poisoned = draw("NaN in one group", (4, 4, 4), seed=8)
    poisoned = replace(
        poisoned, logprobs=_at(poisoned.logprobs, {5: NAN}), old_logprobs=_at(poisoned.old_logprobs, {5: NAN})
    )
    offset = draw("offset", (5, 4, 3), seed=9)
    offset = replace(
        offset,
        rewards=offset.rewards + 1000,
        logprobs=np.round(offset.logprobs * 4) / 4 - 400,
        ref_logprobs=np.round(offset.ref_logprobs * 4) / 4 - 400,
        old_logprobs=np.round(offset.old_logprobs * 4) / 4 - 400,
    )
    stale = draw("stale ratios", (6, 6), seed=10)
    stale = replace(stale, old_logprobs=stale.logprobs - np.linspace(-3, 3, N))
    alone = replace(draw("one response a group", (1,) * 5, seed=11))
    alone = replace(alone, **{k: np.resize(v, N) for k, v in alone.arrays.items()}, group_ids=np.arange(N) % G)
    alone = replace(alone, valid=np.arange(N) < G)
    nothing = replace(draw("nothing valid", (6, 6), seed=12), valid=np.zeros(N, bool))
    lengths = np.array([3, 1, 40, 7, 512, 2, 2, 9, 100, 1, 30, 5])
    weighted = replace(draw("response weights", (5, 2, 1, 4), seed=15), response_weights=lengths**-0.5)
    bare = replace(  # what is not counted may have any weight
        padding,
        name="response weights and padding",
        response_weights=_at(lengths**-1.0, {2: NAN, 5: 0.0, 6: -1.0, 11: INF}),
    )
    return [
        even,
        ragged,
        replace(shuffled, name="shuffled"),
        padding,
        unscored,
        ties,
        huge,
        poisoned,
        offset,
        stale,
        alone,
        nothing,
        weighted,
        bare,
    ]


CASES = _drawn()


@dataclass(frozen=True)
class Worked:
    """A case worked by hand: inputs, what must come out, and how it follows."""

    name: str
    derivation: str
    logprobs: list[float]
    ref_logprobs: list[float]
    rewards: list[float]
    group_ids: list[int]
    beta: float
    expected: dict[str, list[float] | float] = field(default_factory=dict)
    response_weights: list[float] | None = None

    @property
    def case(self) -> Case:
        lp, ref, rewards = (np.array(x, float) for x in (self.logprobs, self.ref_logprobs, self.rewards))
        ids = np.array(self.group_ids)
        case = Case(self.name, lp, ref, lp, rewards, ids, beta=self.beta, num_groups=max(self.group_ids) + 1)
        factors = self.response_weights
        return case if factors is None else replace(case, response_weights=np.array(factors))


WORKED = [
    Worked(
        "a pair",
        "s = (1, 0), D(R) = (1/2, -1/2), beta D(s) = (1/4, -1/4), w = (1/4, -1/4). loss = 2/16 / 1; of beta s the "
        "variance is 2/16, of R 2/4, the covariance 2/8: 1/8 + 1/2 - 2/4 = 1/8. c = w/(1*1). Regret: (1/8)/(2/2); "
        "1/2 log((e^(1/2) + e^(-1/2))/2) = 1/2 log cosh 1/2 = 0.0600572535. RLOO without KL: 2 D(R); std = "
        "sqrt(1/2), GRPO: 0.5/(0.7071067812 + 0.0001). DPO: margin 1/2, sigma(-1/2) = 0.3775406688, "
        "log(1 + e^(-1/2)) = 0.4740769842; its coefficients are beta times the weights. Trajectory balance: w/2. "
        "REBEL's one pair: w. Mirror descent: (D(R) - beta s)/2 = (1/2 - 1/2, -1/2)/2. A*-PO, where pi_old = pi: "
        "V = 1/2 log ((e^(2 - 1) + 1)/2) = 0.3100572535, coefficients (1 - V - 1/2, -V)/2. "
        "MaxRL: D(R)/(1/2) = (1, -1), over k = 2.",
        logprobs=[-1, -2],
        ref_logprobs=[-2, -2],
        rewards=[1, 0],
        group_ids=[0, 0],
        beta=0.5,
        expected={
            "gvpo_weights": [0.25, -0.25],
            "gvpo_coefficients": [0.25, -0.25],
            "gvpo_loss.loss": 0.125,
            "gvpo_loss.implicit_variance": 0.125,
            "gvpo_loss.reward_variance": 0.5,
            "gvpo_loss.covariance": 0.25,
            "gvpo_regret.second_order": 0.125,
            "gvpo_regret.series": 0.06005725347913873,
            "reject_sampling_weights": [1, 0],
            "grpo_weights": [0.7070067953266834, -0.7070067953266834],
            "dr_grpo_weights": [0.5, -0.5],
            "rloo_weights": [1, -1],
            "dpo_weights": [0.3775406687981454, -0.3775406687981454],
            "dpo_loss": 0.4740769841801067,
            "objective_coefficients.gvpo": [0.25, -0.25],
            "objective_coefficients.trajectory_balance": [0.125, -0.125],
            "objective_coefficients.rebel": [0.25, -0.25],
            "objective_coefficients.mirror_descent": [0, -0.25],
            "objective_coefficients.a_star_po": [0.09497137326043064, -0.15502862673956936],
            "objective_coefficients.maxrl": [0.5, -0.5],
            "objective_coefficients.rloo": [0.25, -0.25],
            "objective_coefficients.dpo": [0.1887703343990727, -0.1887703343990727],
        },
    ),
    Worked(
        "three and one alone",
        "theta = ref, so s = 0. D(R) = (-1, 0, 1) in group 0; group 1 has one response: no variance, not in G = 1. "
        "loss = 2/2; c = w/2. std = 1. Reject sampling takes the best of each group, the one alone too; so does SFT, "
        "whose mean over two groups gives 1/(3*2) and 1/(1*2). Dr. GRPO: D(R)/(3*1).",
        logprobs=[-3, -1, -2, -9],
        ref_logprobs=[-3, -1, -2, -9],
        rewards=[4, 5, 6, 7],
        group_ids=[0, 0, 0, 1],
        beta=0.3,
        expected={
            "gvpo_weights": [-1, 0, 1, 0],
            "gvpo_coefficients": [-0.5, 0, 0.5, 0],
            "gvpo_loss.loss": 1,
            "gvpo_loss.group_loss": [1, 0],
            "gvpo_loss.group_size": [3, 1],
            "gvpo_loss.counted_groups": 1,
            "grpo_weights": [-1 / 1.0001, 0, 1 / 1.0001, 0],
            "rloo_weights": [-1.5, 0, 1.5, 0],
            "reject_sampling_weights": [0, 0, 1, 1],
            "sft_weights": [1, 1, 1, 1],
            "objective_coefficients.rloo": [-0.5, 0, 0.5, 0],
            "objective_coefficients.dr_grpo": [-1 / 3, 0, 1 / 3, 0],
            "objective_coefficients.reject_sampling": [0, 0, 0.5, 0.5],
            "objective_coefficients.sft": [1 / 6, 1 / 6, 1 / 6, 1 / 2],
        },
    ),
    Worked(
        "a pair with response weights",
        "As the first pair, with f = (1/2, 2): f s = (1/2, 0), beta D(f s) = (1/8, -1/8), w = (3/8, -3/8), loss = "
        "2 * 9/64. c = f w / (1 * 1). Regret: w/f = (3/4, -3/16), 1/f = (2, 1/2): the weighted mean of w is "
        "(9/16) / (5/2) = 9/40; (3/20)^2 * 2 + (3/5)^2 / 2 = 9/40, over 1 * 2 beta = 1.",
        logprobs=[-1, -2],
        ref_logprobs=[-2, -2],
        rewards=[1, 0],
        group_ids=[0, 0],
        beta=0.5,
        response_weights=[0.5, 2],
        expected={
            "gvpo_weights": [0.375, -0.375],
            "gvpo_coefficients": [0.1875, -0.75],
            "gvpo_loss.loss": 0.28125,
            "gvpo_loss.implicit_variance": 0.03125,
            "gvpo_loss.covariance": 0.125,
            "gvpo_regret.second_order": 0.225,
            "objective_coefficients.gvpo": [0.1875, -0.75],
            "rloo_weights": [1, -1],
        },
    ),
    Worked(
        "equal rewards still pull to the reference",
        "D(R) = 0, s = (1, -1), beta D(s) = (1/2, -1/2): w = (-1/2, 1/2), loss = 1/2. Methods without beta see "
        "nothing, and no pair is to be had.",
        logprobs=[-1, -3],
        ref_logprobs=[-2, -2],
        rewards=[1, 1],
        group_ids=[0, 0],
        beta=0.5,
        expected={
            "gvpo_weights": [-0.5, 0.5],
            "gvpo_loss.loss": 0.5,
            "grpo_weights": [0, 0],
            "rloo_weights": [0, 0],
            "dpo_weights": [0, 0],
            "dpo_loss": 0,
            "reject_sampling_weights": [0.5, 0.5],
        },
    ),
]
