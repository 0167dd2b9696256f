"""What crosses between the devices of a mesh, counted in the compiled programs of 8 simulated devices."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from collectives import collectives, total
from places import ROOT, SUPPORT
from required import require

require(subject="jax")

from jax_collectives_worker import HIDDEN, VOCABULARY


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    path = os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(SUPPORT / "jax_collectives_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp-trained", "fsdp-frozen", "all-trained", "all-frozen"])
def test_a_chunk_of_the_head_moves_no_part_of_the_head(kind: str, counted) -> None:
    """The head is placed once, and its gradient is summed once; only hidden states move in each of the 3 chunks."""
    found = counted[kind]
    assert found["devices"] == 8 and found["apart"] < 2e-5
    in_chunks = [c for c in found["found"] if c["runs"] > 1]
    assert {c["runs"] for c in in_chunks} == {3}
    states = 8 * 2 * HIDDEN * 4  # float32, of a chunk
    assert max(c["bytes"] for c in in_chunks) <= states < VOCABULARY * HIDDEN * 4 // 2
    assert all(str(VOCABULARY) not in c["shape"] for c in in_chunks)


@pytest.mark.slow
def test_a_sampled_token_moves_no_parameters(counted) -> None:
    """Parameters are placed once a rollout, 2 devices a copy; a token moves sums of hidden states and the logits."""
    found = counted["decoding"]
    one, many = found["one"], found["many"]
    assert many["mesh"] == {"data": 1, "fsdp": 4, "split": 2, "tensor": 1}
    assert many["tokens"] == one["tokens"] and max(len(r) for row in one["tokens"] for r in row) > 8
    assert "placed" not in one["programs"] and {"placed", "prefill", "decode"} == many["programs"].keys()
    np.testing.assert_allclose(np.concatenate(many["sums"]), np.concatenate(one["sums"]), rtol=0, atol=1e-4)
    a_token = many["programs"]["decode"]["turn"]
    rows, hidden, layers, vocabulary = 4, 32, 3, 96  # of one of the 4 copies
    assert max(c["bytes"] for c in a_token) <= rows * vocabulary * 4
    states, logits = (2 * layers + 1) * rows * hidden * 4, rows * vocabulary * 4
    assert sum(c["bytes"] * c["runs"] for c in a_token) <= states + logits + 16 * rows * 4 * 4
    placing = many["programs"]["placed"]["all"]
    assert sum(c["bytes"] * c["runs"] for c in placing) <= found["bytes"]  # half a copy is gathered, a part moves


def test_the_reader_of_collectives_counts_loops_and_parts() -> None:
    text = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %g = f32[32]{0} all-gather(%x), channel_id=1, dimensions={0}
  %again = f32[32]{0} all-gather(%x), channel_id=1, dimensions={0}
}

%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %r = f32[4]{0} all-reduce(%a), channel_id=2, to_apply=%add
  %w = (s32[], f32[4]) while(%t), condition=%cond, body=%body
}
"""
    found = collectives(text)
    assert [(c.kind, c.shape, c.bytes, c.runs) for c in found] == [
        ("all-reduce", "f32[4]", 16, 1),
        ("all-gather", "f32[32]", 128, 7),
    ]
    assert total(found) == {"all-reduce": 16, "all-gather": 896}
    assert collectives(text, turn=True) == []


@pytest.mark.parametrize("program", ["", "score_rows", "forward", "backward", "step", "placed", "prefill", "decode"])
@pytest.mark.parametrize("name", ["smollm2-v5e-1x1", "smollm2-v5e-2x2", "qwen2.5-7b-v5e-4x4"])
def test_tpu_compile_bounds_what_each_program_moves(name, program, monkeypatch) -> None:
    """Half of the model's parameters once more, in any program, are beyond a bound."""
    for variable in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # put back afterwards
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import tpu_compile

    case = tpu_compile.CASES[name]
    names = ("score_rows", "forward", "backward", "accumulate", "step", "placed", "prefill", "decode", "no kernels")
    sizes = SimpleNamespace(
        argument_size_in_bytes=0, output_size_in_bytes=0, alias_size_in_bytes=0, temp_size_in_bytes=1
    )
    compiled = SimpleNamespace(memory_analysis=lambda: sizes)
    more = 7.0 if "7b" in name else 0.13
    crossing = lambda of, *_: case.moved.get(of, 0.0) / 1.15 + more * (of == program)
    monkeypatch.setattr(tpu_compile, "make_mesh", lambda case: SimpleNamespace(size=4))
    monkeypatch.setattr(tpu_compile, "programs", lambda case: [(of, compiled, 0) for of in names])
    monkeypatch.setattr(tpu_compile, "moved", crossing)
    monkeypatch.setattr(tpu_compile.blocks, "fits", lambda *given: False)
    assert tpu_compile.examine(name, case) == (not program)
