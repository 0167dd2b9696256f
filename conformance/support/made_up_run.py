"""A run of made-up series, as the report reads it."""

from gvpo_core.training.report.read import Run


def run_of(*, config=None, evaluations=(), events=(), **series):
    """A Run of made-up series: key (with __ for /) -> values, steps from 1."""
    n = len(next(iter(series.values()))) if series else 0
    train = [{"kind": "train", "step": i + 1, "time": i} for i in range(n)]
    for key, values in series.items():
        for record, value in zip(train, values, strict=True):
            record[key.replace("__", "/")] = value
    return Run(None, config or {}, "", {}, train, list(evaluations), list(events))
