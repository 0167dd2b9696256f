"""A run of 100,000 steps and 2,000,000 responses is resumed within 0.5 GB of memory; its files are read a few times."""

import numpy as np
import pytest
from long_run import long_run, resume

from gvpo_core.training.report.columns import Columns

pytestmark = pytest.mark.core
pytest.importorskip("tomli_w", reason="the command line's extra is not installed")


@pytest.mark.parametrize(
    ("steps", "memory"),
    [(5_000, 100), pytest.param(100_000, 500, marks=pytest.mark.slow)],  # MB: 15 more in 5,000 steps, 250 in 100,000
)
def test_a_long_run_is_resumed_in_bounded_memory_and_reading(steps, memory, tmp_path):
    folder = tmp_path / "run"
    long_run(folder, steps, 20)
    before = sum((folder / name).stat().st_size for name in ("metrics.jsonl", "completions.jsonl"))
    cost = resume(folder, steps + 1)
    assert cost.memory / 2**20 < memory
    if cost.read:  # Linux counts it
        assert before < cost.read < 3 * before + 50e6  # 50 MB: the modules that Python imports
    assert (folder / "report.html").stat().st_mtime > (folder / "config.toml").stat().st_mtime - 60


def test_columns_hold_each_steps_last_numbers():
    columns = Columns()
    columns.put(2, {"a": 1, "b": 2.5})
    columns.put(1, {"a": None})
    columns.put(3, {"c": 4})
    columns.put(2, {"a": 7})  # run again after a crash
    assert columns.keys() == ["a", "b", "c"]
    for key, steps, values in (("a", [1, 2], [np.nan, 7]), ("b", [], []), ("c", [3], [4]), ("d", [], [])):
        np.testing.assert_array_equal(columns.series(key), [steps, values])
