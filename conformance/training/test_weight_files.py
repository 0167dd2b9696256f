"""Which safetensors files of a folder are read, and what is refused before any weight is."""

import json

import numpy as np
import pytest

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import hugging_face, weight_files


def write(path, **dtypes: str) -> None:
    """A safetensors file of tensors with 2 x 2 numbers, from the format's own description."""
    sizes = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "BOOL": 1, "I64": 8}
    header, start = {}, 0
    for name, dtype in dtypes.items():
        stop = start + 4 * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": [2, 2], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(start)))


def write_index(folder, **where: str) -> None:
    (folder / weight_files.INDEX).write_text(json.dumps({"weight_map": where}))


def test_model_safetensors_is_read_alone(tmp_path) -> None:
    for name in ("model.safetensors", "model_old.safetensors", "old.safetensors", "adapter_model.safetensors"):
        write(tmp_path / name, **{name: "F32"})
    write_index(tmp_path, other="old.safetensors")  # transformers prefers the single file
    assert set(weight_files.tensors(tmp_path)) == {"model.safetensors"}


def test_the_files_of_the_index_are_read_and_no_others(tmp_path) -> None:
    for name in ("a", "b", "old"):
        write(tmp_path / f"{name}.safetensors", **{name: "BF16"})
    write_index(tmp_path, a="a.safetensors", b="b.safetensors")
    found = weight_files.tensors(tmp_path)
    assert set(found) == {"a", "b"}
    where = found["b"]
    raw = np.fromfile(where.path, np.uint8)[where.start : where.stop]
    assert (where.dtype, where.shape, raw.tolist()) == ("BF16", (2, 2), list(range(8)))


@pytest.mark.parametrize("named", ["other.safetensors", "sub/other.safetensors", "own.safetensors.index.json"])
def test_the_file_that_the_configuration_names_is_read_and_no_other(tmp_path, named) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("model", "other", "sub/other", "a"):
        write(tmp_path / f"{name}.safetensors", **{name: "F32"})
    (tmp_path / "own.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    assert set(weight_files.tensors(tmp_path)) == {
        "a" if named.startswith("own") else named.removesuffix(".safetensors")
    }


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("gone.safetensors", "names gone.safetensors, which is not in the folder"),
        ("../up.safetensors", "names ../up.safetensors, which is outside the model's folder"),
        ("pytorch_model.bin", "expected the name of a safetensors file"),
        (3, "expected the name of a safetensors file"),
    ],
)
def test_a_configuration_that_names_another_file_is_refused(tmp_path, named, message) -> None:
    write(tmp_path / "model.safetensors", a="F32")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(ConfigError, match=message):
        weight_files.weight_files(tmp_path)


def test_files_in_folders_of_the_model_are_read_where_the_index_names_them(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/a"):
        write(tmp_path / f"{name}.safetensors", **{name: "F32"})
    write_index(tmp_path, a="sub/a.safetensors")
    assert set(weight_files.tensors(tmp_path)) == {"sub/a"}
    write_index(tmp_path, a="../a.safetensors")
    with pytest.raises(ConfigError, match=r"names ../a.safetensors, which is outside the model's folder"):
        weight_files.tensors(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path) -> None:
    write(tmp_path / "a.safetensors", one="F32", two="F32")
    write(tmp_path / "b.safetensors", two="F32")
    write_index(tmp_path, one="a.safetensors", two="b.safetensors")
    with pytest.raises(ConfigError, match=r"two is in a.safetensors and in b.safetensors: take the file"):
        weight_files.tensors(tmp_path)


@pytest.mark.parametrize(
    ("names", "index", "message"),
    [
        ((), None, "has no model.safetensors and no model.safetensors.index.json: expected"),
        (("old.safetensors",), None, "old.safetensors is not a name that transformers reads"),
        (("a.safetensors",), {"a": "a.safetensors", "b": "b.safetensors"}, "names b.safetensors, which is not in"),
        ((), [], "index.json cannot be read: TypeError"),
    ],
)
def test_files_that_are_missing_are_named(tmp_path, names, index, message) -> None:
    for name in names:
        write(tmp_path / name, a="F32")
    if index is not None:
        (tmp_path / weight_files.INDEX).write_text(json.dumps({"weight_map": index} if index else index))
    with pytest.raises(ConfigError, match=message):
        weight_files.weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"", "has 0 bytes and ends inside its header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "ends inside its header"),
        ((6).to_bytes(8, "little") + b"{odd: ", "cannot be read as safetensors"),
    ],
)
def test_files_that_are_no_safetensors_are_named(tmp_path, content, message) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        weight_files.tensors(tmp_path)


def test_a_file_cut_short_is_named(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, first="F32", second="F32")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="the file ends inside second"):
        weight_files.tensors(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
def test_weights_that_need_scales_are_refused(tmp_path, dtype) -> None:
    write(tmp_path / "model.safetensors", **{"a.weight": "F32", "b.weight": dtype, "mask": "BOOL"})
    found = weight_files.tensors(tmp_path)
    with pytest.raises(ConfigError, match=f"b.weight is {dtype}, and so are 1 weights in all"):
        weight_files.refuse_integers(found)
    weight_files.refuse_integers(found, quantized=["b.weight"])


def test_a_mask_is_not_a_weight_and_a_weight_is_not_a_mask(tmp_path):
    write(tmp_path / "model.safetensors", **{"a.weight": "F32", "h.0.attn.bias": "BOOL"})
    weight_files.refuse_integers(weight_files.tensors(tmp_path))
    write(tmp_path / "model.safetensors", **{"a.weight": "F32", "b.weight": "BOOL"})
    with pytest.raises(ConfigError, match=r"b\.weight is BOOL"):
        weight_files.refuse_integers(weight_files.tensors(tmp_path))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}}, "bitsandbytes"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization"),
    ],
)
def test_quantization_settings_are_refused_by_name(config, method) -> None:
    with pytest.raises(ConfigError, match=rf"quantised \({method}\), which gvpo_x does not read"):
        weight_files.refuse_quantization(config, "gvpo_x")
    weight_files.refuse_quantization({"model_type": "llama", "quantization_config": None}, "gvpo_x")


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "model.safetensors")])
@pytest.mark.parametrize(
    "file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"]
)
def test_a_folder_with_an_adapter_is_refused(tmp_path, file, beside) -> None:
    for name in (file, *beside):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"holds an adapter \({file}\): merge it"):
        hugging_face.source(ModelConfig(path=str(tmp_path)))


DAMAGES = {
    "overlap": (lambda h: h["b"].update(data_offsets=h["a"]["data_offsets"]), "b begins at byte .* ends at byte"),
    "short": (lambda h: h["b"].update(data_offsets=[16, 28]), r"b, F32 of \[4\], has 12 bytes, not 16"),
    "swapped": (lambda h: h["b"].update(data_offsets=[32, 16]), r"has -16 bytes, not 16"),
    "dtype": (lambda h: h["b"].update(dtype="F16"), r"b, F16 of \[4\], has 16 bytes, not 8"),
    "shape": (lambda h: h["b"].update(shape=[-2, -2, 2]), "has 16 bytes, not 32"),
    "gap": (lambda h: h.pop("a"), "b begins at byte .* ends at byte"),
    "more": (lambda h: h.pop("b"), "bytes and its last tensor ends at byte"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_header_that_contradicts_the_file_is_refused(damage, tmp_path):
    """JAX and MLX would read other weights by such offsets, or end in a traceback."""
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
    }

    def write() -> None:
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(32)))

    write()
    assert list(weight_files.tensors(tmp_path)) == ["a", "b"]
    change, message = DAMAGES[damage]
    change(header)
    write()
    with pytest.raises(ConfigError, match=f"model.safetensors cannot be read as safetensors: .*{message}"):
        weight_files.tensors(tmp_path)
