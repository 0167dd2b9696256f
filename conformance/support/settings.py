"""A subject in one dtype, eager or compiled: what a conformance test is given."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from cases import Case
from compare import assert_close, tolerance_of
from subjects import Subject

MODES = ("eager", "compiled")


@cache
def _compiled(subject: Subject, dtype: str, factory: Callable[..., Any], *options: Any) -> Callable[..., Any]:
    assert subject.compile is not None
    return subject.compile(factory(*options))


@dataclass(frozen=True)
class Setting:
    subject: Subject
    dtype: str
    mode: str

    def array(self, values: Any, *, dtype: str | None = None) -> Any:
        """An array of the subject; floats in the setting's dtype, integers and bools as they are."""
        values = np.asarray(values)
        floating = np.issubdtype(values.dtype, np.floating)
        return self.subject.asarray(values, (dtype or self.dtype) if floating else dtype)

    def numpy(self, x: Any) -> np.ndarray:
        return self.subject.numpy(x)

    def arrays(self, case: Case) -> dict[str, Any]:
        """The case's arrays; under compilation `valid` always is one, so that all cases share a signature.

        In other dtypes than float32 so are the response weights: one program a dtype.
        """
        out = {name: self.array(x) for name, x in case.arrays.items()}
        out["group_ids"] = self.array(case.group_ids)
        mask = np.ones(len(case.rewards), bool) if case.valid is None else case.valid
        out["valid"] = self.array(mask) if case.valid is not None or self.mode == "compiled" else None
        if self.mode == "compiled" and self.dtype != "float32" and case.response_weights is None:
            out["response_weights"] = self.array(np.ones(len(case.rewards)))
        out["finite_rewards"] = self.array(np.where(np.isfinite(case.rewards), case.rewards, 0.0))
        return out

    def rounded(self, case: Case) -> Case:
        """The case with its numbers as the dtype holds them: what the reference is to be given."""
        from dataclasses import replace

        return replace(case, **{name: self.numpy(self.array(x)) for name, x in case.arrays.items()})

    def function(self, factory: Callable[..., Any], *options: Any) -> Callable[..., Any]:
        """factory(*options), compiled once for the whole session in the compiled mode."""
        if self.mode == "eager":
            return factory(*options)
        return _compiled(self.subject, self.dtype, factory, *options)

    def check(self, what: str, got: Any, expected: Any, *, gradient: bool = False) -> None:
        """Compares at the dtype's tolerance; `what` names case and quantity."""
        where = f"{self.subject.name} {self.dtype} {self.mode} {what}"
        tolerance = tolerance_of(self.subject.name, self.dtype, what, gradient=gradient)
        assert_close(self.numpy(got), np.asarray(expected), where=where, tolerance=tolerance)
