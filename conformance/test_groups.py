"""Labels to ids, and sums and maxima within groups, on all subjects."""

import numpy as np
import pytest
from settings import Setting

from gvpo_core import dense_group_ids
from gvpo_core.groups import center, group_max, group_sum

IDS = np.array([3, 0, 3, 1, 0, 3, 1, 3])
VALUES = np.array([1.5, -2.0, 0.25, 4.0, 8.0, -1.0, 0.5, 16.0])


@pytest.mark.core
@pytest.mark.parametrize(
    ("labels", "ids", "groups"),
    [
        (["b", "a", "b"], [0, 1, 0], 2),
        ([(1, 2), (1, 3), (1, 2)], [0, 1, 0], 2),
        (np.array([7, 7, -1]), [0, 0, 1], 2),
        ((x for x in [None, "x", None]), [0, 1, 0], 2),
        ([1, True, 1.0], [0, 0, 0], 1),
    ],
)
def test_dense_group_ids(labels, ids: list[int], groups: int) -> None:
    got, count = dense_group_ids(labels)
    assert got.tolist() == ids and got.dtype == np.int64 and count == groups


@pytest.mark.core
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([], ValueError, "labels is empty; expected one label a response"),
        ([1.0, float("nan")], TypeError, "labels[1] is NaN; NaN equals nothing, so it names no group"),
        ([[1], [2]], TypeError, "labels[0] is a list; expected a hashable label"),
    ],
)
def test_dense_group_ids_refuses(labels: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as e:
        dense_group_ids(labels)
    assert str(e.value) == message


@pytest.mark.capability("values")
@pytest.mark.parametrize("operation", ["sum", "max"])
def test_group_reductions(setting: Setting, operation: str) -> None:
    """Group 2 is empty; 4 groups of 5 rows and fewer; all numbers exact in every dtype."""
    function = setting.function(lambda op: _reduce(op), operation)
    got = function(setting.array(VALUES), setting.array(IDS))
    expected = {"sum": [6.0, 4.5, 0.0, 16.75], "max": [8.0, 4.0, 0.0, 16.0]}[operation]
    got = setting.numpy(got)
    if operation == "max":
        assert got[2] < -6e4
        got = np.where(np.arange(4) == 2, 0, got)
    setting.check(operation, setting.array(got), expected)


def _reduce(operation: str):
    function = {"sum": group_sum, "max": group_max}[operation]
    return lambda values, ids: function(values, ids, 4)


@pytest.mark.capability("NaN stays in its group")
@pytest.mark.modes("eager")
def test_nan_stays_in_its_group(setting: Setting) -> None:
    values = VALUES.copy()
    values[3] = np.nan
    got = setting.numpy(group_sum(setting.array(values), setting.array(IDS), 4))
    assert np.isnan(got).tolist() == [False, True, False, False]


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
def test_centring_leaves_no_mean(setting: Setting) -> None:
    """Numbers about 1e6 with differences about 1: what one pass leaves of the mean, the second takes."""
    rng = np.random.default_rng(0)
    values = (1e6 + rng.normal(0, 1, 3000)).astype(np.float32)
    ids = rng.integers(0, 3, 3000)
    got = setting.numpy(center(setting.array(values), setting.array(np.ones(3000, bool)), setting.array(ids), 3))
    for g in range(3):
        rows = ids == g
        setting.check(f"group {g}", setting.array(got[rows]), values[rows] - values[rows].astype(float).mean())


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("ids", ["int32", "int64", "uint8"])
def test_integer_types_of_ids(setting: Setting, ids: str) -> None:
    if setting.subject.name == "jax" and ids == "int64":
        pytest.skip("JAX has no int64 without x64")
    got = group_sum(setting.array(VALUES), setting.array(IDS.astype(ids), dtype=ids), 4)
    setting.check(ids, got, [6.0, 4.5, 0.0, 16.75])
