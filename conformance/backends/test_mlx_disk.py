"""What only gvpo_mlx has on disk: shards of a size of its own, and adapters beside a merged export."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of, step_difference
from mlx_policies import parameters, policy
from required import require

require(subject="mlx")

OF = batch((4, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.write_model("llama-tied", tmp_path_factory.mktemp("llama"))


def test_a_checkpoint_is_hashed_as_it_is_written_beside_the_next_step(folder, tmp_path) -> None:
    """The state is that of the call: a thread writes it while the next update goes on."""
    of_policy = policy(folder)
    of_policy.update(OF, coefficients_of(OF))
    before = parameters(of_policy)
    write = of_policy.saving(tmp_path)
    assert not list(tmp_path.iterdir())
    of_policy.update(OF, coefficients_of(OF))
    with ThreadPoolExecutor(1) as thread:
        written = thread.submit(write).result()
    for name, digest in written.items():
        content = (tmp_path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == digest
    assert {p.name for p in tmp_path.glob("*.safetensors")} == set(written)
    other = policy(folder)
    other.restore(tmp_path)
    assert step_difference(before, parameters(other)) == 0.0
    assert step_difference(before, parameters(of_policy)) > 0
    other.update(OF, coefficients_of(OF))  # moments too
    assert step_difference(parameters(of_policy), parameters(other)) == 0.0


def test_an_export_larger_than_a_shard_is_split(folder, tmp_path, monkeypatch) -> None:
    from gvpo_core.training.policy import checkpoint

    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    of_policy = policy(folder)
    of_policy.update(OF, coefficients_of(OF))
    of_policy.export(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / "out").glob("model-*.safetensors")}
    assert len(set(index["weight_map"].values())) > 3
    np.testing.assert_allclose(policy(tmp_path / "out").logprobs(OF), of_policy.logprobs(OF), rtol=0, atol=1e-5)


def test_adapters_are_exported_beside_the_merged_model(folder, tmp_path) -> None:
    policy(folder, lora_rank=2).export(tmp_path / "out")  # test_parity_mlx.py loads them in mlx-lm
    assert {p.name for p in (tmp_path / "out" / "adapters").iterdir()} == {
        "adapters.safetensors",
        "adapter_config.json",
    }
