"""Products of few rows while sampling on CPU: transposed on CPUs that gain by it, never in bfloat16."""

import numpy as np
import pytest
import tiny_models
from required import require
from torch_policies import policy

require(subject="torch")
from gvpo_torch import generate

from gvpo_core.training.sampling import Sampling

SEEDS = [list(range(20))]  # rows of a step, within the range of such products


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"))


def drawn(folder, monkeypatch, *, wins: bool, **settings) -> tuple[list, int]:
    """Responses, and how many products were transposed."""
    of_policy = policy(folder, **settings)  # whose check at load decodes in float32
    calls, plain = [], generate._linear
    monkeypatch.setattr(generate, "_linear", lambda layer, x: calls.append(layer) or plain(layer, x))
    monkeypatch.setattr(generate, "_wins_transposed", lambda: wins, raising=False)
    return of_policy.generate([(5, 6, 7)], SEEDS, Sampling(6)), len(calls)


def test_only_where_the_cpu_gains(folder, monkeypatch) -> None:
    found, calls = drawn(folder, monkeypatch, wins=True)
    other, none = drawn(folder, monkeypatch, wins=False)
    assert calls > 0 and none == 0
    assert found == other


def test_never_in_bfloat16(folder, monkeypatch) -> None:
    """Autocast would make them products of one row each, with the weights copied for each."""
    found, calls = drawn(folder, monkeypatch, wins=True, dtype="bfloat16")
    assert found[0] and calls == 0


@pytest.mark.parametrize(("text", "wins"), [("vendor_id : GenuineIntel", True), ("vendor_id : AuthenticAMD", False)])
def test_the_vendor_decides(text, wins, monkeypatch) -> None:
    monkeypatch.setattr(generate.Path, "read_text", lambda path, **options: text)
    generate._wins_transposed.cache_clear()
    assert generate._wins_transposed() is wins
    monkeypatch.undo()
    generate._wins_transposed.cache_clear()
    assert isinstance(generate._wins_transposed(), bool)


def test_the_products_are_those_of_the_layer(folder) -> None:
    import torch

    layer = policy(folder).scorer.decoder.layers[0].mlp.up_proj
    x = torch.randn(20, 1, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        np.testing.assert_allclose(generate._linear(layer, x).numpy(), layer(x).numpy(), rtol=1e-5, atol=1e-5)
