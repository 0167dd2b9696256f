"""What a run remembers of its data is the same in every process, and another for other data."""

import numpy as np
import pytest

from gvpo_core.training.run.fingerprint import fingerprint

pytestmark = pytest.mark.core


def test_a_fingerprint_is_of_the_values_in_order():
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": None}]
    known = fingerprint(rows)
    assert known["rows"] == 2 and fingerprint([dict(reversed(row.items())) for row in rows]) == known
    others = [rows[::-1], rows[:1], [rows[0], rows[1] | {"answer": 0}], [*rows, rows[0]], [rows[0] | {"x": 1}, rows[1]]]
    assert len({known["sha256"], *(fingerprint(other)["sha256"] for other in others)}) == 6
    arrays, objects = ([{"prompt": "a", "x": value}] for value in (np.arange(3), object()))
    assert fingerprint(arrays) == fingerprint([{"prompt": "a", "x": [0, 1, 2]}])
    assert fingerprint(objects) == fingerprint([{"prompt": "a", "x": object()}])
