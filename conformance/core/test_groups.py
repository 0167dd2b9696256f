"""Labels to ids, and sums and maxima within groups, on all subjects."""

import numpy as np
import pytest
from settings import Setting

from gvpo_core import dense_group_ids, grpo_weights, gvpo_loss
from gvpo_core.groups import center, group_max, group_sum

IDS = np.array([3, 0, 3, 1, 0, 3, 1, 3])
VALUES = np.array([1.5, -2.0, 0.25, 4.0, 8.0, -1.0, 0.5, 16.0])
GROUPS = [VALUES[g == IDS] for g in IDS]
GRPO = [(x - g.mean()) / (g.std(ddof=1) + 1e-4) for x, g in zip(VALUES, GROUPS, strict=True)]


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
        (None, TypeError, "labels is a NoneType; expected one label a response, in a list"),
        (np.array(3), TypeError, "labels is a ndarray; expected one label a response, in a list"),
        ([np.array([1, 2])], TypeError, "labels[0] is an array of shape (2,); expected a hashable label"),
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


@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
def test_labels_that_are_arrays(setting: Setting) -> None:
    """Arrays of no dimension count by their value: those of torch and MLX are hashed by identity."""
    numbers = [setting.array(np.array(x)) for x in (7, 7, -1, 7)]
    floats = [setting.array(np.array(x)) for x in (0.5, 0.5, -1.0, 0.5)]
    pairs = [(x, "a") for x in numbers]
    for labels in (numbers, floats, pairs, iter(numbers)):
        ids, count = dense_group_ids(labels)
        assert (ids.tolist(), count) == ([0, 0, 1, 0], 2)
    with pytest.raises(TypeError, match=r"labels\[1\] is NaN"):
        dense_group_ids([setting.array(np.array(x)) for x in (0.5, np.nan)])
    with pytest.raises(TypeError, match=r"labels\[0\] is an array of shape \(2,\); expected a hashable label"):
        dense_group_ids([setting.array(np.array([1, 2]))])


@pytest.mark.capability("values")
@pytest.mark.modes("eager")
@pytest.mark.dtypes("float32")
@pytest.mark.parametrize("ids", [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)])
def test_integer_types_of_ids(setting: Setting, ids: str) -> None:
    """More groups than the narrowest type can count, too."""
    if setting.subject.name == "jax" and "64" in ids:
        pytest.skip("JAX has no 64-bit integers without x64")
    values, rows = setting.array(VALUES), setting.array(IDS.astype(ids), dtype=ids)
    setting.check(ids, group_sum(values, rows, 4), [6.0, 4.5, 0.0, 16.75])
    zeros = setting.array(np.zeros(8))
    for groups in (None, 4, 300):
        got = gvpo_loss(zeros, zeros, values, rows, beta=0.5, num_groups=groups)
        setting.check(ids, got.group_loss[:4], [np.var(VALUES[g == IDS], ddof=1) if g != 2 else 0 for g in range(4)])
        setting.check(ids, grpo_weights(values, rows, num_groups=groups), GRPO)
