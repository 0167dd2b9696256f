"""Attention kernels in Pallas' interpreter: values, gradients, which blocks are computed, policies that use them."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from batches import SMOOTH, batch, coefficients_of, step_difference
from jax_policies import parameters, policy
from packed_attention import Laid, attention, row, sees
from places import SUPPORT
from required import require

require(subject="jax")

import jax
import jax.numpy as jnp
from gvpo_jax import block_pairs, blocks, check, mesh, model

from gvpo_core.training.policy import Batch

FAR = 2**30
ROWS = {
    "several prompts": ([(50, [40, 100, 1]), (130, [70, 0, 60])], 500),
    "padding": ([(10, [3])], 500),
    "edges of blocks": ([(128, [128, 128]), (128, [])], 512),
    "a long prompt": ([(300, [1, 2]), (20, [90, 5])], 500),
    "ragged": ([(3, [200, 7, 31]), (5, [1, 1, 1, 1]), (90, [120])], 500),
    "common beginnings": ([(20, [150, (100, 70), (30, 1), 40, (40, 30)]), (64, [(0, 64), (10, 20), (30, 5)])], 500),
    "a chain with leaves": ([(40, [30, (20, 60), (60, 64), (84, 40), (124, 64), (128, 70)])], 512),
}


def one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1, 1, 1), mesh.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3, devices=jax.devices()[:1])


def given_of(*rows: Laid) -> tuple[jax.Array, ...]:
    """(B, T) positions, segments and last."""
    return tuple(jnp.stack([getattr(of, name) for of in rows]) for name in ("positions", "segments", "last"))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("window", [FAR, 40])
def test_pairs_of_blocks_are_those_with_visible_tokens(name: str, window: int) -> None:
    of = row(ROWS[name][0], 512)
    positions, segments, last = given_of(of)
    segments, last = (jnp.where(segments < 0, block_pairs.PADDING, x) for x in (segments, last))
    far = None if window == FAR else jnp.int32(window)
    found = np.asarray(block_pairs.kinds(segments, last, positions, far, 64))[0]
    seen = sees(of, window)
    visible = 0
    for i in range(8):
        for j in range(8):
            inside = seen[i * 64 : (i + 1) * 64, j * 64 : (j + 1) * 64]
            assert found[i, j] > 0 or not inside.any(), (i, j)
            assert found[i, j] != 2 or inside.all(), (i, j)
            if window == FAR:
                assert (found[i, j] > 0) == inside.any(), (i, j)
                assert i == j or found[i, j] == 2 or not inside.all(), (i, j)
            visible += int(found[i, j] > 0)
    for by_key in (False, True):
        codes, most = block_pairs.pairs(jnp.asarray(found)[None], by_key=by_key)
        codes = np.asarray(codes)
        real = codes[codes & block_pairs.REAL > 0]
        assert len(real) == int(most) == visible
        i, j = (np.asarray(x) for x in block_pairs.blocks_of(real))
        assert {(a, b) for a, b in zip(i, j, strict=True)} == set(zip(*np.nonzero(found), strict=True))
        outer = j if by_key else i
        assert (np.diff(outer) >= 0).all() and set(outer) == set(range(8))
        assert (real & block_pairs.FIRST > 0).sum() == (real & block_pairs.LAST > 0).sum() == 8
        np.testing.assert_array_equal((real & block_pairs.WHOLE > 0), found[i, j] == 2)


@pytest.mark.slow
def test_visited_blocks_of_the_jobs() -> None:
    """J1 and J2 of docs/scaling.md, every response at its full length; the bound is of all pairs of tokens."""
    for prompt, response, k, bound in ((512, 2048, 8, 0.12), (1024, 4096, 16, 0.055)):
        length = prompt + response * k
        length += -length % 512
        of = row([(prompt, [response] * k)], length)
        positions, segments, last = (jnp.where(x < 0, block_pairs.PADDING, x) for x in given_of(of))
        found = block_pairs.kinds(segments, last, positions, None, 512)
        _, most = block_pairs.pairs(found, by_key=False)
        assert 0.8 * bound < int(most) / found[0].size <= bound


CASES = {
    "float32": (jnp.float32, 2, None, FAR),
    "one head of keys": (jnp.float32, 1, None, FAR),
    "cap and window": (jnp.float32, 4, 2.0, 37),
    "bfloat16": (jnp.bfloat16, 2, None, FAR),
}


@pytest.mark.slow_on("bfloat16", "one head of keys")
@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_gradients(name: str) -> None:
    dtype, key_heads, cap, window = CASES[name]
    rows = [row(ROWS[name][0], 512) for name in ("several prompts", "common beginnings", "a chain with leaves")]
    draw = np.random.default_rng(3)
    heads = (4, key_heads, key_heads, 4)
    q, k, v, above = (jnp.asarray(draw.normal(size=(3, 512, h, 16)), jnp.float32).astype(dtype) for h in heads)

    def kernel(*qkv: jax.Array) -> jax.Array:
        return blocks.attend(
            one_device(), *qkv, *given_of(*rows), jnp.int32(window), scale=0.25, cap=cap, windowed=window != FAR
        )

    program = jax.jit(lambda *qkv: (kernel(*qkv), jax.vjp(kernel, *qkv)[1](above)))
    assert {"gvpo_flash", "gvpo_flash_queries", "gvpo_flash_keys"} <= names_of_kernels(program, q, k, v)
    out, gradients = program(q, k, v)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    for b, of in enumerate(rows):
        seen = sees(of, window)
        host = [np.asarray(x[b].astype(jnp.float32)) for x in (q, k, v)]
        wanted = attention(*host, seen, np.asarray(above[b].astype(jnp.float32)), 0.25, cap)
        for what, got, expected in zip(("out", "q", "k", "v"), (out, *gradients), wanted, strict=True):
            error = np.abs(np.asarray(got[b].astype(jnp.float32)) - expected).max() / np.abs(expected).max()
            assert error < tolerance, (what, b, error)


def names_of_kernels(program, *given) -> set[str]:
    """Of the Pallas kernels that a program calls."""
    text = str(jax.make_jaxpr(program)(*given))
    return {line.split("name=")[1].split()[0] for line in text.splitlines() if "name=gvpo_flash" in line}


def test_skipped_blocks_are_not_computed() -> None:
    """NaN in what a block does not see would reach it through any product: 0 * NaN is NaN."""
    given = given_of(row([(128, [128, 128])], 384))
    draw = np.random.default_rng(4)
    q, k, v, above = (jnp.asarray(draw.normal(size=(1, 384, 2, 8)), jnp.float32) for _ in range(4))

    def kernel(*qkv: jax.Array) -> jax.Array:
        return blocks.attend(one_device(), *qkv, *given, jnp.int32(FAR), scale=0.3, cap=None, windowed=False)

    assert blocks.block_size(384) == 128
    spoil = lambda x: x.at[:, 128:256].set(jnp.nan)  # the first response, which the second does not see
    program = jax.jit(lambda *qkv: (kernel(*qkv), jax.vjp(kernel, *qkv)[1](above)))
    out, (to_q, _, _) = program(q, spoil(k), spoil(v))
    assert np.isnan(out[:, 128:256]).all()
    assert np.isfinite(out[:, :128]).all() and np.isfinite(out[:, 256:]).all()
    assert np.isfinite(to_q[:, 256:]).all()
    _, (_, *gradients) = program(spoil(q), k, v)
    for gradient in gradients:
        assert np.isfinite(gradient[:, 256:]).all() and np.isnan(gradient[:, 128:256]).all()


@pytest.mark.slow
def test_meshes_compute_what_one_device_computes() -> None:
    path = os.pathsep.join([str(SUPPORT), *(p for p in sys.path if p)])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    worker = [sys.executable, str(SUPPORT / "jax_blocks_worker.py")]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3
    for name, errors in found.items():
        assert max(errors) < 1e-5, (name, errors)


def long_batch() -> Batch:
    """Two groups whose packed rows take several blocks."""
    draw = np.random.default_rng(2)
    tokens = lambda n: tuple(draw.integers(0, tiny_models.VOCABULARY, n).tolist())
    prompts = [tokens(150), tokens(20)]
    responses = [tokens(n) for n in (140, 1, 90, 33, 60)]
    responses[2], responses[4] = responses[0][:70] + responses[2], responses[3] + responses[4]
    return Batch([prompts[0]] * 3 + [prompts[1]] * 2, responses, [0, 0, 0, 1, 1])


def by_kernel(of_policy, monkeypatch) -> list[tuple[int, ...]]:
    """Has the policy use the kernels and nothing else; the shapes of queries that they are then called with."""
    assert not of_policy.setup.in_blocks  # not on CPU
    given = (of_policy.scorer, of_policy.learner.parameters, of_policy.learner.adapters)
    assert check.in_blocks(*given) and not of_policy.describe().memory.in_blocks
    of_policy.attend_in_blocks()
    assert of_policy.describe().memory.in_blocks
    shapes, plain = [], blocks._call
    monkeypatch.setattr(model, "weighted", None)  # what the other path computes with
    monkeypatch.setattr(blocks, "_call", lambda *given, **o: shapes.append(given[5]["q"].shape) or plain(*given, **o))
    return shapes


SETTINGS = {
    "float32": {},
    "checkpointing": {"gradient_checkpointing": True, "strategy": "score"},
    "lora": {"lora_rank": 2, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_without_the_kernel(name: str, tmp_path, monkeypatch) -> None:
    folder = tiny_models.write_model("qwen2", tmp_path, max_position_embeddings=512)
    settings = SMOOTH | {"micro_batch_tokens": 768} | SETTINGS[name]
    of = long_batch()

    def moved(of_policy):
        before = parameters(of_policy)
        logprobs = of_policy.logprobs(of)
        update = of_policy.update(of, coefficients_of(of))
        after = parameters(of_policy)
        return {n: after[n] - before[n] for n in after}, logprobs, update

    wanted, logprobs, update = moved(policy(folder, **settings))
    of_policy = policy(folder, **settings)
    shapes = by_kernel(of_policy, monkeypatch)
    found, other, updated = moved(of_policy)
    assert len(shapes) >= 4 and min(shape[2] for shape in shapes) >= blocks.NARROWEST
    np.testing.assert_allclose(other, logprobs, rtol=0, atol=1e-3)
    np.testing.assert_allclose(updated.logprobs, update.logprobs, rtol=0, atol=1e-3)
    assert step_difference(wanted, found) < 1e-5


@pytest.mark.slow
def test_bfloat16_goes_through_the_kernel(tmp_path, monkeypatch) -> None:
    folder = tiny_models.write_model("qwen2", tmp_path, max_position_embeddings=512)
    of_policy, of = policy(folder, dtype="bfloat16", micro_batch_tokens=768), long_batch()
    plain = of_policy.logprobs(of)
    shapes = by_kernel(of_policy, monkeypatch)
    lengths = np.asarray([len(response) for response in of.responses])
    assert (np.abs(of_policy.logprobs(of) - plain) / lengths).mean() < 0.02
    assert shapes


def test_short_rows_take_the_other_path(tmp_path, monkeypatch) -> None:
    of_policy, of = policy(tiny_models.write_model("qwen2", tmp_path), micro_batch_tokens=64), batch()
    wanted = of_policy.logprobs(of)
    of_policy.attend_in_blocks()
    monkeypatch.setattr(blocks, "attend", None)
    np.testing.assert_array_equal(of_policy.logprobs(of), wanted)


@pytest.mark.slow_on("gradient")
@pytest.mark.parametrize("fault", ["wrong", "gradient", "fails"])
def test_what_the_kernel_gets_wrong_is_not_used_by_name(fault: str, tmp_path, monkeypatch, caplog) -> None:
    of_policy = policy(tiny_models.write_model("llama", tmp_path, max_position_embeddings=512))
    plain = blocks._local_backward if fault == "gradient" else blocks._local_forward

    def spoiled(kernel, q, *given):
        if fault == "fails":
            raise RuntimeError("Mosaic cannot lower this")
        if fault == "gradient":
            to_q, *others = plain(kernel, q, *given)
            return (to_q * 3, *others)
        mixed, normaliser = plain(kernel, q, *given)
        return mixed * 1.5, normaliser

    monkeypatch.setattr(blocks, "_local_backward" if fault == "gradient" else "_local_forward", spoiled)
    monkeypatch.setattr("gvpo_jax.programs._kept", {})
    with caplog.at_level(logging.INFO, "gvpo.jax"):
        given = (of_policy.scorer, of_policy.learner.parameters, of_policy.learner.adapters)
        assert not check.in_blocks(*given)
    said = {"wrong": "log-probs differ by up to", "gradient": "a gradient differs by", "fails": "Mosaic cannot lower"}
    assert "attention does not use the kernel" in caplog.text and said[fault] in caplog.text


def test_a_tpu_uses_the_kernel_where_the_check_passes(tmp_path, monkeypatch) -> None:
    """The platform alone decides whether to check, and the check whether to use it."""
    from gvpo_jax import policy as module

    folder, asked = tiny_models.write_model("llama", tmp_path, max_position_embeddings=512), []

    def opened(answer: bool):
        monkeypatch.setattr(module, "in_blocks", lambda *given: asked.append(given) or answer)
        monkeypatch.setattr(module, "is_tpu", lambda mesh: True)
        return policy(folder)

    for answer in (True, False):
        of_policy = opened(answer)
        setups = (of_policy.setup, of_policy.scorer.setup, of_policy.learner.setup, of_policy.scorer.sampling)
        assert {setup.in_blocks for setup in setups} == {answer}
    assert len(asked) == 2
