"""The one place for tolerances, and the comparison that every check goes through."""

import numpy as np

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
# 16-bit inputs are compared with the reference on the inputs as rounded, and computed in float32
TOLERANCE |= {"bfloat16": TOLERANCE["float32"], "float16": TOLERANCE["float32"]}

# gradients come back in the dtype of the input: one rounding of the right value, half of these at most
GRADIENT_TOLERANCE = {**TOLERANCE, "bfloat16": 2.0**-8, "float16": 2.0**-10}

# MLX 0.32.4 computes exp of float64 to float32's precision (relative error 1e-7)
THROUGH_EXP = ("series", "dpo", "bradley_terry", "ratio", "objective_coefficients")


def tolerance_of(subject: str, dtype: str, quantity: str, *, gradient: bool = False) -> float:
    """The tolerance of a quantity, exceptions included."""
    if subject == "mlx" and dtype == "float64" and any(part in quantity for part in THROUGH_EXP):
        dtype = "float32"
    return (GRADIENT_TOLERANCE if gradient else TOLERANCE)[dtype]


def assert_close(got: np.ndarray, expected: np.ndarray, *, where: str, tolerance: float) -> None:
    """Fails unless |got - expected| <= tolerance * max(1, |expected|) everywhere.

    NaN and infinities must stand in the same places.

    Args:
      got, expected: arrays of one shape.
      where: subject, dtype, mode, case and quantity, for the message.
    Raises: AssertionError: one line, with the worst index.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise AssertionError(f"{where}: got shape {got.shape}, expected {expected.shape}")
    if got.size == 0:
        raise AssertionError(f"{where}: nothing to compare")
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    finite = np.isfinite(got) & np.isfinite(expected)
    error = np.where(same, 0.0, np.inf)
    np.subtract(got, expected, out=error, where=finite)
    error = np.abs(error)
    excess = error / np.maximum(1, np.where(finite, np.abs(expected), 1))
    worst = np.unravel_index(np.argmax(excess), got.shape)
    if not excess[worst] <= tolerance:
        index = ",".join(str(int(i)) for i in worst)
        raise AssertionError(
            f"{where}[{index}]: got {got[worst]!r}, expected {expected[worst]!r}, "
            f"error {error[worst]:.3g}, tolerance {tolerance:.3g} of max(1, |expected|)"
        )
