"""What a run of `trl_runs` must have done."""

from pathlib import Path
from typing import Any

import trl_runs


def check_steps(folder: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Every step moved the parameters, and as the reference did."""
    beta = settings.get("beta", 0.1)
    wanted = trl_runs.reference(folder, found["start"], found["seen"], beta=beta, lora=settings.get("lora", False))
    assert len(wanted) == len(found["steps"]) == settings.get("max_steps", 3)
    for step, (ours, theirs) in enumerate(zip(wanted, found["steps"], strict=True)):
        moved = sum(float(((ours[name] - p) ** 2).sum()) for name, p in found["start"].items()) ** 0.5
        apart = sum(float(((ours[name] - theirs[name]) ** 2).sum()) for name in ours) ** 0.5
        size = sum(float((p**2).sum()) for p in ours.values()) ** 0.5
        assert moved > 1e-3 * size, f"step {step} has hardly moved"
        assert apart < 1e-5 * size, f"step {step}: apart by {apart / size:.1e}"
        assert apart < 2e-4 * moved, f"step {step}: apart by {apart / moved:.1e} of the way"
