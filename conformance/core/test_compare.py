"""The comparator fails when it should, with one line that says where."""

import math

import numpy as np
import pytest
from compare import TOLERANCE, assert_close

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.1]),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0 + 1e-4]),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, math.nan]),
        ([math.inf], [-math.inf]),
        ([math.inf], [1e30]),
        ([1.0], [1.0, 1.0]),
        ([], []),
        ([[1.0]], [1.0]),
        (0.0, 2e-5),
    ],
)
def test_fails(got: object, expected: object) -> None:
    with pytest.raises(AssertionError):
        assert_close(np.asarray(got), np.asarray(expected), where="numpy", tolerance=TOLERANCE["float32"])


def test_passes() -> None:
    values = np.array([1.0, math.nan, math.inf, -math.inf, 1e6])
    assert_close(values, values * (1 + 1e-6), where="numpy", tolerance=TOLERANCE["float32"])


def test_message_is_one_line() -> None:
    with pytest.raises(AssertionError) as e:
        assert_close(
            np.array([[1.0, 2.0]]), np.array([[1.0, 2.5]]), where="mlx float32 compiled ragged loss", tolerance=1e-5
        )
    assert str(e.value) == (
        "mlx float32 compiled ragged loss[0,1]: got np.float64(2.0), expected np.float64(2.5), error 0.5, "
        "tolerance 1e-05 of max(1, |expected|)"
    )
