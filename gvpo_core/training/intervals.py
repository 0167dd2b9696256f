"""95 % confidence intervals: of a mean (Student's t), of a share (Wilson), of held-out rewards."""

import math

import numpy as np

Z = 1.959964
"""The two-sided 95 % quantile of the normal distribution."""


def mean_half_width(values: np.ndarray) -> float:
    """Half the 95 % confidence interval of the mean of independent values: Student's t; NaN for fewer than two."""
    n = len(values)
    return math.nan if n < 2 else student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)


def prompts_half_width(means: np.ndarray) -> float:
    """Half the 95 % interval of the mean of (P,) prompts' mean rewards; NaN for fewer than two.

    Student's t, or the larger side of Wilson's interval if every prompt scores 0 or 1: for 0 of 24 correct prompts,
    Student's t would give a width of 0.
    """
    if len(means) < 2 or not np.isin(means, (0.0, 1.0)).all():
        return mean_half_width(means)
    share = float(np.mean(means))
    low, high = wilson(float(means.sum()), len(means))
    return max(high - share, share - low)


def wilson(hits: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; (0, 1) if `total` is 0."""
    if total <= 0:
        return 0.0, 1.0
    p = hits / total
    middle = p + Z**2 / (2 * total)
    half = Z * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    return (middle - half) / (1 + Z**2 / total), (middle + half) / (1 + Z**2 / total)


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, to 1e-3."""
    exact = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if freedom <= len(exact):
        return exact[freedom - 1]
    terms = (  # Cornish-Fisher expansion in 1 / freedom
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum((term / math.pow(freedom, power) for power, term in enumerate(terms, 1)), 0.0)
