"""What every subject is compared with: float64 and plain loops, written from the paper's equations, not from the core.

`reference(case)` returns name -> expected array for each quantity of `quantities.CALLS`, and `gradients(case)` the
derivative in logprobs of each scalar of `quantities.SCALARS`.
"""

import math
from dataclasses import replace

import numpy as np
from cases import Case


def members(case: Case, *, least: int = 1) -> dict[int, list[int]]:
    """Group -> its counted rows, of groups with `least` or more; valid rows whose reward is a number (Cor. 3.4)."""
    found: dict[int, list[int]] = {g: [] for g in range(case.num_groups)}
    for i, g in enumerate(case.group_ids):
        if (case.valid is None or case.valid[i]) and not math.isnan(case.rewards[i]):
            found[int(g)].append(i)
    return {g: rows for g, rows in found.items() if len(rows) >= least}


def centred(values: np.ndarray, rows: list[int]) -> list[float]:
    mean = math.fsum(float(values[i]) for i in rows) / len(rows)
    return [float(values[i]) - mean for i in rows]


def exp(x: float) -> float:
    return math.inf if x > 709.7 else math.exp(x)


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def shift(w: list[float], f: list[float], beta: float) -> float:
    """c with mean exp((w - c) / (beta f)) = 1, by bisection."""
    if any(map(math.isnan, w)):
        return math.nan
    low, high = min(w), max(w)
    while low < (middle := (low + high) / 2) < high:  # until no number lies between them
        mean = math.fsum(exp((x - middle) / (beta * y)) for x, y in zip(w, f, strict=True)) / len(w)
        low, high = (middle, high) if mean > 1 else (low, middle)
    return middle


def regret(w: list[float], f: list[float], beta: float) -> tuple[float, float]:
    """Second order and series: half a variance of w weighted by 1/f, and beta E f (exp(u) - 1 - u)."""
    k, inverse = len(w), [1 / y for y in f]
    middle = math.fsum(x * y for x, y in zip(w, inverse, strict=True)) / math.fsum(inverse)
    second = math.fsum((x - middle) ** 2 * y for x, y in zip(w, inverse, strict=True)) / (k - 1) / (2 * beta)
    c = shift(w, f, beta)
    u = [(x - c) / (beta * y) for x, y in zip(w, f, strict=True)]
    return second, beta * math.fsum(y * (exp(x) - 1 - x) for x, y in zip(u, f, strict=True)) / k


def gvpo(case: Case) -> dict[str, np.ndarray]:
    """Eq. 12, 16, 17, and the regret of Eq. 5; with response weights those of GVPO++, arXiv 2609.21432."""
    n, beta = len(case.rewards), case.beta
    groups = members(case, least=2)
    f = np.ones(n)
    if case.response_weights is not None:
        for rows in groups.values():
            f[rows] = case.response_weights[rows]
    s = f * (case.logprobs - case.ref_logprobs)
    weights, coefficients = np.zeros(n), np.zeros(n)
    names = ("loss", "implicit_variance", "reward_variance", "covariance")
    parts = {name: np.zeros(case.num_groups) for name in names}
    second, series = np.zeros(case.num_groups), np.zeros(case.num_groups)
    for g, rows in groups.items():
        reward, implicit = centred(case.rewards, rows), [beta * d for d in centred(s, rows)]
        k = len(rows)
        w = [a - b for a, b in zip(reward, implicit, strict=True)]
        for i, x in zip(rows, w, strict=True):
            weights[i] = x
            coefficients[i] = f[i] * x / ((k - 1) * len(groups))
        parts["loss"][g] = math.fsum(x * x for x in w) / (k - 1)
        parts["implicit_variance"][g] = math.fsum(x * x for x in implicit) / (k - 1)
        parts["reward_variance"][g] = math.fsum(x * x for x in reward) / (k - 1)
        parts["covariance"][g] = math.fsum(a * b for a, b in zip(reward, implicit, strict=True)) / (k - 1)
        second[g], series[g] = regret(w, [float(f[i]) for i in rows], beta)
    mean = lambda x: np.asarray(x.sum() / max(len(groups), 1))
    out = {"gvpo_weights": weights, "gvpo_coefficients": coefficients}
    for name, x in parts.items():
        out[f"gvpo_loss.{name}"] = mean(x)
        out["gvpo_loss.group_" + name] = x
    sizes = {g: len(rows) for g, rows in members(case).items()}
    out["gvpo_loss.group_size"] = np.array([sizes.get(g, 0) for g in range(case.num_groups)], float)
    out["gvpo_loss.counted_groups"] = np.asarray(float(len(groups)))
    out["gvpo_regret.second_order"] = mean(second)
    out["gvpo_regret.group_second_order"] = second
    out["gvpo_regret.series"] = mean(series)
    out["gvpo_regret.group_series"] = series
    return out


def advantages(case: Case, name: str, beta: float) -> np.ndarray:
    """Eq. 3 and its kin on R - beta (log pi_old - log pi_ref)."""
    out = np.zeros(len(case.rewards))
    penalised = case.rewards - (beta * (case.old_logprobs - case.ref_logprobs) if beta else 0.0)
    for rows in members(case, least=2).values():
        d = centred(penalised, rows)
        k = len(rows)
        # rewards that are equal have no spread, whatever rounding says
        spread = math.sqrt(math.fsum(x * x for x in d) / (k - 1)) + 1e-4
        factor = {"grpo": 1 / spread, "dr_grpo": 1.0, "rloo": k / (k - 1)}[name]
        for i, x in zip(rows, d, strict=True):
            out[i] = factor * x
    return out


def clipped(case: Case, adv: np.ndarray, clip: float = 0.2) -> np.ndarray:
    """The derivative in log pi of min(rho A, clamp(rho) A), PPO's form of Eq. 19."""
    out = np.zeros(len(adv))
    for i, a in enumerate(adv):
        if a == 0:
            continue
        rho = exp(case.logprobs[i] - case.old_logprobs[i])
        bounded = min(max(rho, 1 - clip), 1 + clip) if rho == rho else rho
        out[i] = 0.0 if rho != bounded and rho * a > bounded * a else rho * a
    return out


def pairs(case: Case) -> dict[int, tuple[list[int], list[int], float]]:
    """Group -> best rows, worst rows, beta (s_best - s_worst); groups whose rewards are all equal have no pair."""
    out = {}
    s = case.logprobs - case.ref_logprobs
    for g, rows in members(case, least=2).items():
        rewards = [case.rewards[i] for i in rows]
        best = [i for i in rows if case.rewards[i] == max(rewards)]
        worst = [i for i in rows if case.rewards[i] == min(rewards)]
        if max(rewards) > min(rewards):
            margin = case.beta * (sum(s[i] for i in best) / len(best) - sum(s[i] for i in worst) / len(worst))
            out[g] = (best, worst, margin)
    return out


def rivals(case: Case) -> dict[str, np.ndarray]:
    """Coefficients of trajectory balance, REBEL, mirror descent, A*-PO, GSPO and MaxRL, each from its paper's loss.

    trajectory_balance  arXiv 2503.18929: 1/k sum_i (log Z + s_i - R_i/beta)^2, log Z = 1/k sum_j (R_j/beta - s_j)
    rebel               arXiv 2404.16767: the mean over pairs i < j of (beta (s_i - s_j) - (R_i - R_j))^2
    mirror_descent      arXiv 2501.12599, Eq. 3: 1/k sum_i ((R_i - mean R) grad log pi_i - tau/2 grad s_i^2)
    a_star_po           arXiv 2505.20686: 1/k sum_i (beta s_i - (R_i - V))^2
    gspo                arXiv 2507.18071, Eq. 5 to 7
    maxrl               arXiv 2602.02710: 1/k sum_i (R_i - mean R) / mean R grad log pi_i
    """
    names = ("trajectory_balance", "rebel", "mirror_descent", "a_star_po", "gspo", "maxrl")
    out = {name: np.zeros(len(case.rewards)) for name in names}
    groups, beta = members(case, least=2), case.beta
    s = case.logprobs - case.ref_logprobs
    s_old = case.old_logprobs - case.ref_logprobs
    advantage, lengths = advantages(case, "grpo", beta), case.arrays["lengths"]
    for rows in groups.values():
        k, scale = len(rows), len(rows) * len(groups)
        log_z = math.fsum(case.rewards[i] / beta - s[i] for i in rows) / k
        mean = math.fsum(case.rewards[i] for i in rows) / k
        top = max((case.rewards[i] / beta - s_old[i] for i in rows), key=lambda x: math.inf if math.isnan(x) else x)
        value = beta * (top + math.log(math.fsum(exp(case.rewards[i] / beta - s_old[i] - top) for i in rows) / k))
        for i in rows:
            residual = log_z + s[i] - case.rewards[i] / beta
            out["trajectory_balance"][i] = -beta * residual / scale  # the loss times beta/2
            # the loss over 4 beta, a mean over k (k - 1) / 2 pairs
            pairs_of_i = [(case.rewards[i] - case.rewards[j]) - beta * (s[i] - s[j]) for j in rows if j != i]
            out["rebel"][i] = math.fsum(pairs_of_i) / (k * (k - 1)) / len(groups)
            out["mirror_descent"][i] = ((case.rewards[i] - mean) - beta * s[i]) / scale
            out["a_star_po"][i] = (case.rewards[i] - value - beta * s[i]) / scale
            length = lengths[i]
            ratio, a = exp((case.logprobs[i] - case.old_logprobs[i]) / length), advantage[i]
            bounded = min(max(ratio, 0.8), 1.2) if ratio == ratio else ratio
            is_clipped = a != 0 and ratio != bounded and ratio * a > bounded * a
            out["gspo"][i] = 0.0 if a == 0 or is_clipped else ratio * a / length / scale
    shrunk = replace(case, rewards=np.abs(case.rewards))
    for rows in groups.values():
        mean = math.fsum(shrunk.rewards[i] for i in rows) / len(rows)
        for i, x in zip(rows, centred(shrunk.rewards, rows), strict=True):
            out["maxrl"][i] = x / mean if mean > 0 else 0.0
    ratios = clipped(shrunk, out["maxrl"])
    for rows in groups.values():
        for i in rows:
            out["maxrl"][i] = ratios[i] / (len(rows) * len(groups))
    return {f"objective_coefficients.{name}": values for name, values in out.items()}


def reference(case: Case) -> dict[str, np.ndarray]:
    """Name -> expected value, for every quantity of the core."""
    n = len(case.rewards)
    out = gvpo(case)
    valid = np.ones(n, bool) if case.valid is None else case.valid
    out["sft_weights"] = valid.astype(float)
    best, even = np.zeros(n), np.zeros(n)
    for rows in members(case).values():
        top = max(case.rewards[i] for i in rows)
        winners = [i for i in rows if case.rewards[i] == top]
        for i in rows:
            best[i] = 1 / len(winners) if i in winners else 0
            even[i] = 1 / len(rows)
    out["reject_sampling_weights"] = best
    groups, scored = max(len(members(case)), 1), members(case, least=2)
    out["objective_coefficients.reject_sampling"] = best / groups
    out["objective_coefficients.sft"] = even / groups
    for name in ("grpo", "dr_grpo", "rloo"):
        out[f"{name}_weights"] = advantages(case, name, 0.0)
        penalised = advantages(case, name, case.beta)
        out[f"{name}_weights.kl"] = penalised
        coefficients = clipped(case, penalised)
        for rows in scored.values():
            for i in rows:
                coefficients[i] /= len(rows) * len(scored)
        out[f"objective_coefficients.{name}"] = coefficients
    dpo, losses, of_groups = np.zeros(n), [], pairs(case)
    for winners, losers, margin in of_groups.values():
        weight = exp(-softplus(margin))
        losses.append(softplus(-margin))
        for i in winners:
            dpo[i] = weight / len(winners)
        for i in losers:
            dpo[i] = -weight / len(losers)
    out["dpo_weights"] = dpo
    out["dpo_loss"] = np.asarray(sum(losses) / max(len(losses), 1))
    out["objective_coefficients.dpo"] = case.beta * dpo / max(len(losses), 1)
    out["objective_coefficients.gvpo"] = out["gvpo_coefficients"]
    out |= rivals(case)
    margins = [a - b for a, b, v in zip(case.rewards, case.ref_logprobs, valid, strict=True) if v]
    losses = [softplus(-m) for m in margins if not math.isnan(m)]
    out["bradley_terry_loss"] = np.asarray(sum(losses) / max(len(losses), 1))
    out["importance_ratio"] = np.array([exp(d) for d in case.logprobs - case.old_logprobs])
    finite = np.where(np.isfinite(case.rewards), case.rewards, 0.0)
    out["clipped_ratio_weights"] = clipped(case, finite * valid)
    return out


def gradients(case: Case) -> dict[str, np.ndarray]:
    """Name -> derivative in logprobs, worked out on paper: `test_objective_gradients` checks it by differences."""
    values = reference(case)
    c = values["gvpo_coefficients"]
    series, second = np.zeros(len(c)), np.zeros(len(c))
    scored = members(case, least=2)
    for rows in scored.values():
        w = [float(values["gvpo_weights"][i]) for i in rows]
        f = [1.0 if case.response_weights is None else float(case.response_weights[i]) for i in rows]
        k, beta = len(rows), case.beta
        # d series / d w_i = (exp(u_i) - 1) / k, as the derivative in c is 0; w_i = ... - beta (f_i s_i - mean)
        at = shift(w, f, beta)
        of_series = [(exp((x - at) / (beta * y)) - 1) / k for x, y in zip(w, f, strict=True)]
        middle = math.fsum(x / y for x, y in zip(w, f, strict=True)) / math.fsum(1 / y for y in f)
        of_second = [(x - middle) / y / (k - 1) / beta for x, y in zip(w, f, strict=True)]
        for target, of_w in ((series, of_series), (second, of_second)):
            total = math.fsum(of_w) / k
            for i, y, d in zip(rows, f, of_w, strict=True):
                target[i] = -beta * y * (d - total) / len(scored)
    return {
        "gvpo_loss": -2 * case.beta * c,
        "gvpo_surrogate": -c,
        "gvpo_regret.second_order": second,
        "gvpo_regret.series": series,
        "dpo_loss": -values["objective_coefficients.dpo"],
        "importance_ratio": values["importance_ratio"],
        "weights are constants": np.zeros(len(c)),
    }
