"""Collectives of a sharded run on 2 gloo ranks: how many a sampled token takes, and the bytes an update gathers.

python benchmarks/scale/torch_gathers.py FOLDER OUT     one rank, with torchrun's variables
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RANKS, LAYERS = 2, 4
SIZES = {"num_hidden_layers": LAYERS, "hidden_size": 128, "intermediate_size": 512}
TOKENS = (2, 66)


def counts() -> Iterator[Any]:
    from benchmarks.scale.table import Count

    counted = _run()
    on, (few, many) = f"tiny llama, {RANKS} ranks", TOKENS
    more, before = (
        {kind: (counted[f"{how} {many}"][kind] - counted[f"{how} {few}"][kind]) / (many - few) for kind in KINDS}
        for how in ("sampled", "ungathered")
    )
    yield Count("parameter gathers per sampled token", on, "", before["gathers"], more["gathers"], 0)
    yield Count("control collectives per sampled token", on, "", None, more["control"], 1 / 64)
    yield Count(
        "parameter gathers per rollout and layer", on, "", None, counted[f"sampled {many}"]["gathers"] / LAYERS, 2.25
    )
    twice_in_16_bits = 2 * 2 * counted["parameters"]  # for the forward and the backward pass
    gathered = counted["update"]["bytes"] / twice_in_16_bits
    name = "bytes gathered per micro-batch / 2 x bytes of the parameters in 16 bits"
    yield Count(name, on, "", None, gathered, 1.05)


KINDS = ("gathers", "control", "bytes")


def _run() -> dict[str, Any]:
    support = str(ROOT / "conformance" / "support")
    sys.path.insert(0, support)
    import tiny_models

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_models.make_model("llama", Path(name) / "model", **SIZES)
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
        env |= {"LOCAL_WORLD_SIZE": str(RANKS), "PYTHONPATH": os.pathsep.join([support, *(p for p in sys.path if p)])}
        command = [sys.executable, __file__, str(folder), str(Path(name) / "found.json")]
        ranks = [
            subprocess.Popen(command, env=os.environ | env | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(RANKS)
        ]
        statuses = [rank.wait(timeout=600) for rank in ranks]
        if any(statuses):
            raise RuntimeError("a rank failed")
        return json.loads((Path(name) / "found.json").read_text())  # type: ignore[no-any-return]


def _counted(call: Callable[[], object]) -> dict[str, int]:
    """Runs `call`. Returns how often it gathers parameters, their bytes, and the number of other collectives."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counted = dict.fromkeys(KINDS, 0)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "c10d" in operation.namespace and "_base" in str(operation) and "gather" in str(operation):
                counted["gathers"] += 1
                counted["bytes"] += args[0].nbytes
            elif "c10d" in operation.namespace and "reduce_scatter" not in str(operation):
                counted["control"] += 1
            return operation(*args, **(kwargs or {}))

    with Counter():
        call()
    return counted


def main() -> None:
    import numpy as np
    import torch
    from batches import batch, coefficients_of
    from torch.distributed.fsdp import FSDPModule
    from torch_policies import policy

    from gvpo_core.training.sampling import Sampling

    of_policy = policy(Path(sys.argv[1]), device="cpu", sharding="fsdp", dtype="bfloat16", micro_batch_responses=99)
    assert isinstance(of_policy._trained, FSDPModule)
    of = batch((2, 2))
    counted: dict[str, Any] = {"parameters": of_policy.parameters}
    of_policy.update(of, coefficients_of(of))
    lengths: list[int] = []

    def sample(tokens: int) -> None:
        drawn = of_policy.generate([(5, 6, 7)], [[1, 2]], Sampling(tokens))
        lengths.append(max(len(response.tokens) for row in drawn for response in row))

    for tokens in TOKENS:
        counted[f"sampled {tokens}"] = _counted(lambda tokens=tokens: sample(tokens))
    from gvpo_torch import policy as module

    module.gathered = lambda of: contextlib.nullcontext()  # type: ignore[assignment]
    for tokens in TOKENS:
        counted[f"ungathered {tokens}"] = _counted(lambda tokens=tokens: sample(tokens))
    assert lengths == [*TOKENS, *TOKENS], "a response ended early"
    scored = of_policy.logprobs(of)
    counted["update"] = _counted(lambda: of_policy.update(of, coefficients_of(of), scored=np.asarray(scored)))
    if of_policy.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(counted))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
