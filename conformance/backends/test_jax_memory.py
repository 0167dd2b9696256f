"""What gvpo_jax holds and reads: no copy of the weights for a backward pass, no more cache than planned, one head."""

import jax_policies
import numpy as np
import pytest
import tiny_models
from batches import batch
from required import require

require(subject="jax")

import jax
from gvpo_jax import generate, mesh, programs, rows, update, weights

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy.hugging_face import portable_config

OF = batch((4, 3, 2))
TOKENS = 2**15


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_the_backward_pass_is_given_the_weights_not_copies(settings, tmp_path) -> None:
    of = jax_policies.policy(tiny_models.write_model("qwen2", tmp_path), gradient_checkpointing=True, **settings)
    planned = rows.plan(OF, of._splitting.groups(OF)[0], of._splitting, of.mesh)[0]
    arguments = (*of.learner._all, mesh.put_all(planned.arrays, of.mesh))
    _, saved = of.programs.call(update.forward, (of.setup,), *arguments)
    weights_shapes = {a.shape for a in jax.tree.leaves(arguments[:2]) if a.ndim > 1}
    assert not weights_shapes & {a.shape for a in saved.arrays}
    assert sum(at is not None for at in saved.given) >= 10


@pytest.mark.parametrize("shards", [1, 4])
def test_prompts_decoded_together_fit_the_cache_as_padded(shards: int) -> None:
    draw = np.random.default_rng(0)
    prompts = [(1,) * int(n) for n in draw.integers(1, 300, 60)]
    seeds = [[0] * int(n) for n in draw.integers(1, 12, 60)]
    room = rows.bucket(100)
    chunks = generate.chunks_of(prompts, seeds, room, TOKENS, shards)
    places = sorted((i, j) for chunk in chunks for i, of in chunk for j in of)
    assert places == [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
    for chunk in chunks:
        lines, responses, width = generate.shape_of(chunk, prompts, room, shards)
        assert lines >= len(chunk) and lines % shards == 0
        assert all(len(of) <= responses and len(prompts[i]) <= width for i, of in chunk)
        assert lines * (width + responses * room) <= TOKENS
    assert len(chunks) < len(prompts)


def test_a_device_that_does_not_hold_the_model_says_what_to_do(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr(weights, "load", full)
    with pytest.raises(
        programs.OutOfMemoryError, match=r"in the model's parameters: raise model.mesh_fsdp .*123 bytes"
    ):
        jax_policies.policy(tiny_models.write_model("llama", tmp_path))


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tiny_models.write_model("llama-tied", tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    jax_policies.policy(folder)
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"tie_word_embeddings = true, but lm_head.weight differs from"):
        jax_policies.policy(folder)


def test_what_config_json_leaves_out_is_transformers_default(tmp_path) -> None:
    import json

    from gvpo_jax.families import SETTINGS, read_spec

    from gvpo_core.training.policy.hugging_face import read_config

    def spec(family: str, *left_out: str):
        folder = tiny_models.write_model(family, tmp_path / family)
        config = json.loads((folder / "config.json").read_text())
        config = {name: value for name, value in config.items() if name not in left_out}
        (folder / "config.json").write_text(json.dumps(config))
        return read_spec(read_config(folder, lambda _: SETTINGS))

    assert spec("mistral", "sliding_window").windows == (4096, 4096)
    theta = spec("llama", "rope_theta", "rope_parameters").ropes[0].frequencies
    np.testing.assert_allclose(theta, 10000.0 ** (-np.arange(4) / 4), rtol=1e-12)
    assert spec("qwen3", "head_dim").each[0].width == 128


def test_an_export_names_its_dtype_once() -> None:
    assert portable_config({"torch_dtype": "bfloat16"}, "float32") == {"dtype": "float32"}
