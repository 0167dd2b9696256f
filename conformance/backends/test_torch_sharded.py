"""Sharded models compute packed rows by blocks and sample in fixed buffers, as other models on CUDA; here on CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from batches import step_difference
from required import require
from torch_processes import run_processes

require(subject="torch")

import torch_sharded_worker as worker

QUICK = "lora"  # the kind of the fast run, computed alone
COMPARED = {(2, "fast"): (1, "fast"), (1, "fast"): (1, "dense"), (2, "dense"): (1, "dense")}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(processes, kind, "fast" or "dense") -> arrays of both steps; and the ranks' samples."""
    top = tmp_path_factory.mktemp("sharded")
    folder = tiny_models.make_model("qwen2", top / "model", max_position_embeddings=1024)
    done: dict[tuple[int, str, str], Path] = {}

    def get(size: int, kind: str, how: str) -> tuple[dict[str, np.ndarray], list[Any]]:
        if (size, kind, how) not in done:
            others = [(name, x) for name in worker.KINDS if name != QUICK for x in ("fast", "dense")]
            runs = [(kind, how)] if kind == QUICK else others
            out = top / f"{size} {kind} {how}"
            out.mkdir()
            run_processes(size, "torch_sharded_worker.py", [str(folder), str(out), json.dumps(runs)], out)
            done.update({(size, *one): out for one in runs})
        out = done[size, kind, how]
        ranks = [json.loads((out / f"{kind} {how} {rank}.json").read_text()) for rank in range(size)]
        return dict(np.load(out / f"{kind} {how}.npz")), ranks

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", worker.KINDS)
def test_blocks_take_the_step_of_one_process_and_of_the_dense_mask(kind: str, found) -> None:
    """Two steps; in the second a rank has no rows. The worker asserts that blocks ran, and that no mask was made."""
    for (size, how), (other_size, other) in COMPARED.items():
        in_16_bits = kind == "bfloat16" and how != other  # the mask's kernel rounds otherwise
        arrays, right = found(size, kind, how)[0], found(other_size, kind, other)[0]
        for number in ("0", "1"):
            moved = [
                {name: x for name, x in values.items() if name.startswith("moved") and name.endswith(number)}
                for values in (right, arrays)
            ]
            assert step_difference(*moved) < (0.3 if in_16_bits else 1e-4), (size, how, number)
        for name in ("scored", "logprobs 0", "logprobs 1", "norm 0", "norm 1"):
            tolerance = {"rtol": 0.05, "atol": 2.0} if in_16_bits else {"rtol": 1e-4, "atol": 2e-3}
            np.testing.assert_allclose(arrays[name], right[name], **tolerance, err_msg=f"{size} {how} {name}")


@pytest.mark.slow_on(*(kind for kind in worker.KINDS if kind != QUICK))
@pytest.mark.parametrize("kind", worker.KINDS)
def test_rows_are_refilled_and_draw_the_tokens_of_one_process(kind: str, found) -> None:
    """In fixed buffers of three rows; no collective but those that gather the parameters once a rollout."""
    _, (alone,) = found(1, kind, "fast" if kind == "bfloat16" else "dense")
    _, ranks = found(2, kind, "fast")
    tokens: list[Any] = [None] * len(worker.PROMPTS)
    for rank, (drawn, collectives, placed, _) in enumerate(ranks):
        tokens[rank::2] = drawn
        assert placed > 2, "no row took the place of one that had ended"
        assert 0 < sum(collectives.values()) <= 2 * 2 + 1  # of 2 layers and the rest
    assert max(len(row) for rows in tokens for row in rows) == worker.TOKENS
    if kind == "bfloat16":  # another order of rows, whose products round otherwise
        same = [a == b for x, y in zip(tokens, alone[0], strict=True) for a, b in zip(x, y, strict=True)]
        assert np.mean(same) > 0.5
    else:
        assert tokens == alone[0]
