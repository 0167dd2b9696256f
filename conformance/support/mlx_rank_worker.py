"""One of two processes that train the same tiny MLX policy; started by test_mlx_ranks.py with mlx.launch.

python mlx_rank_worker.py FOLDER OUT
"""

import json
import sys
from pathlib import Path

import numpy as np
from batches import batch, coefficients_of, masked
from mlx_policies import parameters, policy

SMOOTH = {"learning_rate": 0.5, "betas": (0.0, 0.0), "eps": 1.0}
OF = masked(batch((4, 3, 2, 5)))  # context tokens in most responses
CUTS = {"split groups": 5, "an empty process": len(OF)}  # rows before it are the first process's
KINDS = {"full": {}, "lora": {"lora_rank": 3, "learning_rate": 3.0}}


def step(of_policy, rows: list[int]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """One update in which this process holds `rows` of OF; what it reports, and the parameters after it."""
    weights = coefficients_of(OF)
    calls = []

    def coefficients(logprobs: np.ndarray, part: np.ndarray) -> np.ndarray:
        calls.append(part)
        places = of_policy.gather(np.asarray(rows, np.int64)[part])
        every = weights(of_policy.gather(logprobs), places)
        return every[[places.tolist().index(row) for row in np.asarray(rows, np.int64)[part]]]

    update = of_policy.update(OF.take(rows), coefficients)
    assert of_policy.world_size == 1 or len(calls) == 1
    return {"gradient_norm": update.gradient_norm}, parameters(of_policy)


def main(folder: str, out: str) -> None:
    for kind, settings in KINDS.items():
        for name, cut in CUTS.items():
            of_policy = policy(Path(folder), **(SMOOTH | settings))
            assert of_policy.world_size == 2
            rows = [list(range(cut)), list(range(cut, len(OF)))][of_policy.rank]
            facts, after = step(of_policy, rows)
            facts["ranks"] = of_policy.describe().ranks
            here = Path(out) / f"{kind}, {name}, {of_policy.rank}"
            here.with_suffix(".json").write_text(json.dumps(facts))
            np.savez(here.with_suffix(".npz"), **after)
    for dtype in (np.float64, np.int64, np.uint8, bool, np.float32):
        own = np.arange(3 * of_policy.rank, dtype=np.float64).astype(dtype)  # none on the first
        gathered = of_policy.gather(own)
        assert gathered.dtype == own.dtype and gathered.tolist() == np.arange(3.0).astype(dtype).tolist()
        wide = of_policy.gather(np.full((2, 3), of_policy.rank, dtype=dtype))
        assert wide.tolist() == [[dtype(r)] * 3 for r in (0, 0, 1, 1)]
    assert of_policy.gather(np.zeros((0, 3))).shape == (0, 3)
    assert of_policy.gather(np.array([1 / 3])).tolist() == [1 / 3] * 2  # float64, to the bit


if __name__ == "__main__":
    main(*sys.argv[1:])
