"""Bytes that JAX moves between devices when it samples and computes the head, read from programs for 8 simulated CPUs.

conformance/support/jax_collectives_worker.py compiles the programs in a separate process, because the number of devices
is fixed when JAX starts. `nox -s tpu_compile` counts the same bytes in programs for TPUs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.scale.table import Count

SUPPORT = Path(__file__).parents[2] / "conformance" / "support"
sys.path.insert(0, str(SUPPORT))

ON = "tiny llama, 8 simulated devices"


def counted() -> dict[str, Any]:
    """Runs the worker and returns the results that it prints."""
    path = os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    environment = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SUPPORT / "jax_collectives_worker.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def moved(collectives: list[dict[str, Any]]) -> int:
    return sum(c["bytes"] * c["runs"] for c in collectives)


def counts() -> Iterator[Count]:
    from jax_collectives_worker import HIDDEN, LLAMA, ROWS, VOCABULARY

    results = counted()
    decoding, size = results["decoding"], results["decoding"]["bytes"]
    many = decoding["many"]
    if many["tokens"] != decoding["one"]["tokens"]:
        raise RuntimeError("8 devices sample other tokens than one")
    rows, hidden = 4, LLAMA["hidden_size"]  # rows of each of the 4 copies
    sums = (2 * LLAMA["num_hidden_layers"] + 1) * rows * hidden * 4 + rows * LLAMA["vocab_size"] * 4 + 16 * rows * 4 * 4
    a_token = moved(many["programs"]["decode"]["turn"])
    # Before: the parameters were gathered at every token.
    yield Count("bytes moved per sampled token / bytes of the parameters", ON, "", 1.0, a_token / size, sums / size)
    placing = moved(many["programs"]["placed"]["all"])
    yield Count("bytes moved to make the sampling copy / bytes of the parameters", ON, "", None, placing / size, 1.0)
    head, states = VOCABULARY * HIDDEN * 4, ROWS * 2 * HIDDEN * 4
    for kind in ("trained", "frozen"):
        for mesh in ("fsdp", "all"):
            in_chunks = [c for c in results[f"{mesh}-{kind}"]["found"] if c["runs"] > 1]
            if not in_chunks:
                raise RuntimeError("no chunk of the head moves anything: the programs were not read")
            largest = max(c["bytes"] for c in in_chunks) / head
            name = f"largest array moved for a chunk of a {kind} head / bytes of the head"
            on = f"8 simulated devices, {'data x fsdp x tensor = 2 x 2 x 2' if mesh == 'all' else 'fsdp 8'}"
            yield Count(name, on, "", 1.0, largest, states / head)
