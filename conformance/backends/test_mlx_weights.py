"""Which tensors gvpo_mlx reads, what it refuses of them, and sums of many numbers."""

import json
import shutil

import mlx_policies
import numpy as np
import pytest
import tiny_models
from batches import batch, coefficients_of
from mlx_policies import policy
from required import require

require(subject="mlx")

import mlx.core as mx
import mlx.nn as nn
from gvpo_mlx import weights
from gvpo_mlx.logprobs import logsumexp
from gvpo_mlx.update import square_sum
from safetensors.numpy import load_file, save_file

from gvpo_core.training.config import ConfigError
from gvpo_core.training.sampling import Sampling

OF = batch((2,), longest=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


@pytest.mark.parametrize("name", ["model_old.safetensors", "model-00001-of-00001.safetensors", "old.safetensors"])
def test_another_safetensors_file_is_not_read(name: str, copied) -> None:
    right = policy(copied).logprobs(OF)
    tensors = load_file(copied / "model.safetensors")
    save_file({key: value * 3 for key, value in tensors.items()}, copied / name, metadata={"format": "pt"})
    np.testing.assert_array_equal(policy(copied).logprobs(OF), right)


def test_the_files_of_an_index_are_read_by_any_name(copied) -> None:
    right = policy(copied).logprobs(OF)
    (copied / "model.safetensors").rename(copied / "weights-a.safetensors")
    names = load_file(copied / "weights-a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights-a.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(policy(copied).logprobs(OF), right)


def test_integers_without_scales_are_refused(copied) -> None:
    tensors = load_file(copied / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.round(tensors[name] * 100).astype(np.int8)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight is I8"):
        policy(copied, lora_rank=2)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", "hqq"])
def test_another_quantization_is_refused_by_name(method: str, llama, tmp_path) -> None:
    folder = tiny_models.changed(llama, tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ConfigError, match=rf"quantised \({method}\); gvpo_mlx reads MLX's own"):
        policy(folder, lora_rank=2)


def test_an_adapter_beside_a_model_is_refused(copied) -> None:
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter \(adapter_config\.json\)"):
        policy(copied)


class Mapped(nn.Module):
    """A model whose `sanitize` does what mlx-lm's do."""

    def __init__(self, args: str) -> None:
        super().__init__()
        self.args = args

    def sanitize(self, tensors):
        made = {
            "stacked": mx.stack([tensors["experts.0"], tensors["experts.1"]]),
            "turned": tensors["conv"].moveaxis(2, 1),
            "norm": tensors["norm"] + 1.0,
            "renamed": tensors["plain"],
        }
        made["gate"], made["up"] = mx.split(tensors["both"], 2, axis=0)
        heads = tensors["heads"].reshape(2, 3, -1)
        made["one"], made["other"] = mx.contiguous(heads[:, :2].swapaxes(-1, -2)), heads[:, 2:]
        made |= {
            "dropped": {},
            "scaled": {"plain": tensors["plain"] * 3.0},
            "half": {"gate": tensors["both"][:1]},
            "": {},
        }[self.args]
        if self.args == "dropped":
            del made["norm"]
        if self.args == "half":
            del made["up"]
            made["up"] = tensors["both"][2:]
        if self.args == "scaled":
            made["renamed"] = made.pop("plain")
        return made


SHAPES = {
    "experts.0": (2, 3), "experts.1": (2, 3), "conv": (4, 1, 3), "norm": (5,), "plain": (2,), "both": (4, 2),
    "heads": (6, 4), "rotary_emb.inv_freq": (4,),
}  # fmt: skip


def origin(of: str, tmp_path) -> tuple[weights.Origin, dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return weights.Origin(Mapped(of), tmp_path), tensors


def test_weights_go_back_to_the_tensors_of_the_files(tmp_path) -> None:
    of, tensors = origin("", tmp_path)
    of.check({"model_type": "mapped"})
    made = Mapped("").sanitize({name: mx.array(value) for name, value in tensors.items()})
    moved = {name: value + 0.5 for name, value in made.items()}
    found = of.tensors(moved)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        wanted = value if "inv_freq" in name else value + 0.5  # what is not read is copied
        np.testing.assert_allclose(np.array(found[name]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dropped", "mapped drops norm, which transformers reads"),
        ("scaled", "mapped multiplies by 3 or reads 3 times plain"),
        ("half", "mapped drops a part of both"),
    ],
)
def test_a_tensor_that_would_be_read_otherwise_is_refused(kind: str, message: str, tmp_path) -> None:
    of, _ = origin(kind, tmp_path)
    with pytest.raises(ConfigError, match=message):
        of.check({"model_type": "mapped"})


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("apertus", {"beta", "eps"}),
        ("deepseek_v3", {"e_score_correction_bias"}),
        ("afmoe", {"expert_bias"}),
        ("ernie4_5_moe", {"e_score_correction_bias"}),
        ("gpt_neox", set()),
    ],
)
def test_constants_of_a_family_are_found_in_its_source(kind: str, names: set[str]) -> None:
    assert names <= weights.constants(kind)
    assert not {"weight", "bias", "alpha_p", "sinks", "A_log", "dt_bias"} & weights.constants(kind)


def test_an_export_that_reads_back_otherwise_is_refused(copied, tmp_path, monkeypatch) -> None:
    made = policy(copied)
    plain = weights.Origin.tensors

    def spoiled(self, values):
        found = plain(self, values)
        return found | {"model.norm.weight": found["model.norm.weight"] + 1.0}

    monkeypatch.setattr(weights.Origin, "tensors", spoiled)
    with pytest.raises(ConfigError, match=r"read back, differs from the trained llama\.Model by up to"):
        made.export(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cap_that_is_not_known_is_found_in_every_dtype(dtype: str, llama, monkeypatch) -> None:
    from mlx_lm.models import llama as mlx_llama

    plain = mlx_llama.Model.__call__

    def capped(self, *arguments, **options):
        return mx.tanh(plain(self, *arguments, **options) / 30.0) * 30.0

    monkeypatch.setattr(mlx_llama.Model, "__call__", capped)
    monkeypatch.setattr("gvpo_mlx.twin.compare", lambda *_: "not compared")
    with pytest.raises(ConfigError, match="it changes its logits in an unknown way"):
        policy(llama, dtype=dtype, lora_rank=2)


def test_rows_beyond_a_window_are_taken(tmp_path) -> None:
    """Those of transformers: test_parity_mlx_families.py."""
    folder = tiny_models.write_model("mistral", tmp_path / "model", sliding_window=6)
    made = policy(folder)
    assert made.scorer.window is None and not made.packed
    drawn = made.generate([(1, 2, 3), tuple(range(4, 14))], [[1, 2], [3]], Sampling(12))
    assert [len(row) for row in drawn] == [2, 1]
    long = batch((2,), longest=16)
    assert max(len(p) + len(r) for p, r in zip(long.prompts, long.responses, strict=True)) > 12
    wide = policy(tiny_models.write_model("mistral", tmp_path / "wide", sliding_window=None))
    assert np.abs(made.logprobs(long) - wide.logprobs(long)).max() > 0.01
    before = made.logprobs(long)
    made.update(long, coefficients_of(long))
    checkpointed = policy(folder, gradient_checkpointing=True)
    np.testing.assert_allclose(checkpointed.logprobs(long), before, rtol=0, atol=1e-5)
    checkpointed.update(long, coefficients_of(long))
    for name, value in mlx_policies.parameters(made).items():
        np.testing.assert_allclose(value, mlx_policies.parameters(checkpointed)[name], rtol=0, atol=1e-4)


def test_a_layer_that_takes_no_mask_limits_the_rows(tmp_path, monkeypatch) -> None:
    from mlx_lm.models import llama as mlx_llama

    plain = mlx_llama.TransformerBlock.__call__
    monkeypatch.setattr(mlx_llama.TransformerBlock, "__call__", lambda self, *a, **o: plain(self, *a, **o))
    made = policy(tiny_models.write_model("mistral", tmp_path / "model", sliding_window=16))
    with pytest.raises(
        ConfigError, match=r"a row has 22 tokens; .* has a sliding window of 16, which mlx-lm leaves out"
    ):
        made.generate([tuple(range(1, 15))], [[1]], Sampling(8))


@pytest.mark.parametrize("window", [0, -3, "7", 2.5, [4]])
def test_a_window_that_is_none_is_refused_in_one_line(window: object, tmp_path) -> None:
    folder = tiny_models.write_model("mistral", tmp_path / "model")
    odd = tiny_models.changed(folder, tmp_path, sliding_window=window)
    with pytest.raises(ConfigError, match="sliding_window") as error:
        policy(odd)
    assert "\n" not in str(error.value)


def test_kinds_of_layers_that_do_not_fit_are_refused_in_one_line(tmp_path) -> None:
    folder = tiny_models.write_model("qwen2", tmp_path / "model", use_sliding_window=True, sliding_window=6)
    odd = tiny_models.changed(folder, tmp_path, layer_types=["sliding_attention"] * 5)
    with pytest.raises(ConfigError, match="layer_types") as error:
        policy(odd)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("vocabulary", [96, 1000, 50257, 151936])
def test_logsumexp_of_a_large_vocabulary_is_exact(vocabulary: int) -> None:
    """mx.logsumexp on CPU: 3e-5 here, 2.6e-4 for equal logits."""
    draw = np.random.default_rng(0).standard_normal((2, vocabulary)).astype(np.float32)
    for logits in (draw, np.zeros_like(draw)):
        right = np.log(np.exp(logits.astype(np.float64)).sum(1))
        np.testing.assert_allclose(np.array(logsumexp(mx.array(logits))), right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(49152, 576), (7, 3), (100_003,), ()])
def test_the_norm_of_a_large_gradient_is_exact(shape: tuple[int, ...]) -> None:
    """mx.sum in float32 on CPU: 3.3 % too low at the first shape."""
    draw = np.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    right = float(np.square(draw.astype(np.float64)).sum())
    assert square_sum(mx.array(draw)) == pytest.approx(right, rel=1e-6)
