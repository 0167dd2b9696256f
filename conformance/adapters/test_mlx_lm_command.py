"""`python -m gvpo_mlx_lm`: from mlx-lm's YAML file to its adapters, and one line for whatever cannot be used."""

import json
import os
import re
from pathlib import Path

import pytest
import tiny_models
from required import require

if (asked := os.environ.get("GVPO_SUBJECTS")) and "mlx_lm" not in asked.split(","):
    pytest.skip("GVPO_SUBJECTS does not name mlx_lm: nox -s 'conformance(mlx)' runs these", allow_module_level=True)
require("mlx_lm", "mlx.core", subject="mlx_lm")

import mlx.core as mx
import mlx_lm
from gvpo_mlx_lm.__main__ import main
from mlx_lm.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.write_model("llama", tmp_path_factory.mktemp("model"))


def scored_responses(data: Path) -> Path:
    data.mkdir()
    row = {"prompt": "say a:", "responses": ["a", "bb", "ccc"], "rewards": [1.0, None, 0.0], "finished": [True] * 3}
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return data


@pytest.fixture(autouse=True)
def eager():
    """MLX compiles by a C++ compiler on CPU, which takes seconds a step."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def test_the_command_line(folder, tmp_path, capfd):
    """From mlx-lm's YAML file to adapters that mlx-lm loads, and one line for what cannot be used."""
    data = scored_responses(tmp_path / "data")
    (tmp_path / "lora.yaml").write_text(
        f"model: {folder}\ndata: {data}\nnum_layers: 2\niters: 4\nbatch_size: 1\ngrad_accumulation_steps: 2\n"
        f"adapter_path: {tmp_path / 'adapters'}\nbeta: 0.2\nlearning_rate: 0.01\noptimizer_config: {{adamw: {{}}}}\n"
        "lora_parameters: {rank: 2, dropout: 0.0, scale: 4.0}\n"
    )
    command = ["--config", str(tmp_path / "lora.yaml"), "--train"]
    assert main(command) == 0
    trained, _ = mlx_lm.load(str(folder), model_config={"rope_theta": 700.0}, adapter_path=str(tmp_path / "adapters"))
    assert float(mx.abs(trained.layers[0].self_attn.q_proj.lora_b).max()) > 0
    capfd.readouterr()
    for bad, message in (
        (["--test"], "not supported here"),
        (["--resume-adapter-file", "x", "--fine-tune-type", "full"], "would become the reference"),
        (["--data", str(tmp_path)], "no such file"),
        (["--max-seq-length", "5"], "max_seq_length = 5"),
    ):
        assert main(command + bad) == 2
        assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "config = 'none.yaml' cannot be read: No such file"),
        (["--model", "here", "--resume-adapter-file", "none.safetensors"], "'none.safetensors': there is no such file"),
        (["--model", "here", "--grad-accumulation-steps", "0"], "grad_accumulation_steps = 0; expected an integer of"),
        (["--model", "here", "--beta", "nan"], "beta is nan; expected a finite number"),
        (["--model", "here", "--num-layers", "99"], "num_layers = 99, but the model has 2; -1 takes all"),
        (["--model", "path/to/a/model"], "model = 'path/to/a/model': there is no such folder"),
        (["--model", "empty"], "mlx-lm cannot load 'empty': "),
        ([], "model is not given; name the folder"),
        ("[", "is not YAML: while parsing"),
        ("- beta: 1\n", "holds a list; expected settings, `name: value`"),
        ("betta: 1\n", "has betta; expected settings"),
        ("{model: null}", "model is not given"),
        ("{model: here, data: null}", "data = None; expected a path"),
        ("{model: here, beta: high}", "beta is 'high'"),
        ("{model: here, iters: 1.5}", "iters = 1.5; expected an integer"),
        ("{model: here, learning_rate: fast}", "learning_rate = 'fast'"),
        ("{model: here, fine_tune_type: loro}", "fine_tune_type = 'loro'; expected one of lora, dora, full"),
        ("{model: here, optimizer: adamm}", "optimizer = 'adamm'; expected one of adam, adamw"),
        ("{model: here, lora_parameters: {rank: 2}}", "has no dropout, scale"),
        ("{model: here, lr_schedule: {name: cosine}}", "is not in mlx.optimizers: AttributeError: "),
        ("{model: here, lr_schedule: {name: cosine_decay}}", "is not in mlx.optimizers: KeyError: 'arguments'"),
        ("{model: here, lr_schedule: {name: cosine_decay, arguments: [1, 2, 3, 4]}}", "optimizers: TypeError: "),
        ("{model: here, lora_parameters: {rank: 0, scale: 1.0, dropout: 0.0}}", "rank = 0; expected an integer of at"),
        (
            "{model: here, lora_parameters: {rank: 2, scale: .nan, dropout: 0.0}}",
            "scale = nan; expected a finite number",
        ),
        ("{model: here, lora_parameters: {rank: 2, scale: 0, dropout: 0.0}}", "scale = 0; expected a finite number"),
        ("{model: here, lora_parameters: {rank: 2, scale: 1.0, dropout: 0.1}}", "dropout = 0.1; expected 0: GVPO's"),
        (
            "{model: here, lora_parameters: {rank: 2, scale: 1, dropout: 0, alpha: 4}}",
            "has alpha; expected rank, scale",
        ),
        ("{model: here, lora_parameters: {rank: 2, scale: 1, dropout: 0, keys: q}}", "keys = 'q'; expected a list of"),
        ("{model: here, learning_rate: .nan}", "learning_rate = nan; expected a finite number above 0"),
        ("{model: here, learning_rate: 0}", "learning_rate = 0; expected a finite number above 0"),
        ("{model: here, optimizer_config: [1]}", "optimizer_config = [1]; expected {adam: {name: value}}"),
        ("{model: here, optimizer_config: {adam: {beta: 1}}}", "optimizer_config.adam has beta; expected betas, eps"),
        ("{model: here, grad_checkpoint: 'false'}", "grad_checkpoint = 'false'; expected true or false"),
        ("{model: here, val_batches: 0}", "val_batches = 0 is a mean over nothing; expected -1"),
        ("{model: here, num_layers: 0}", "num_layers = 0 means all layers to mlx-lm; expected -1"),
        ("{model: here, seed: 18446744073709551616}", "seed = 18446744073709551616; expected an integer below 2**64"),
        ("{model: here, adapter_path: lora.yaml}", "adapter_path = 'lora.yaml' is a file; expected a folder"),
        ("{model: here, data: scored, num_layers: 2, report_to: it}", "report_to = 'it': it callback doesn't exist"),
    ],
)
def test_what_the_command_line_cannot_use_is_one_line(arguments, message, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").symlink_to(folder)
    (tmp_path / "empty").mkdir()
    scored_responses(tmp_path / "scored")
    if isinstance(arguments, str):
        (tmp_path / "lora.yaml").write_text(arguments)
        arguments = ["--config", "lora.yaml"]
    assert main([*arguments, "--train"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("gvpo_mlx_lm: ") and message in error and error.count("\n") == 1


def trains(
    folder: Path, tmp_path: Path, name: str, *more: str, lora: str = "{rank: 2, dropout: 0.0, scale: 4.0}"
) -> int:
    (tmp_path / f"{name}.yaml").write_text(
        f"model: {folder}\ndata: {tmp_path / 'data'}\nnum_layers: 2\niters: 2\nbatch_size: 2\nlearning_rate: 0.01\n"
        f"adapter_path: {tmp_path / name}\nlora_parameters: {lora}\n"
    )
    return main(["--config", str(tmp_path / f"{name}.yaml"), *more])


def test_without_train_nothing_is_trained(folder, tmp_path, capfd):
    scored_responses(tmp_path / "data")
    assert trains(folder, tmp_path, "not") == 2
    assert "train is not set; add --train" in capfd.readouterr().err
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("more", "lora", "message"),
    [
        (("--fine-tune-type", "dora"), "{rank: 2, dropout: 0.0, scale: 4.0}", r"has no model\.layers\.0\..*\.m, and"),
        ((), "{rank: 3, dropout: 0.0, scale: 4.0}", r"lora_a of shape \(48, 2\), .* ask for shape \(48, 3\): mlx-lm"),
        (("--num-layers", "1"), "{rank: 2, dropout: 0.0, scale: 4.0}", "lora_a of shape .* ask for no such tensor"),
    ],
)
def test_adapters_of_other_settings_are_not_resumed(more, lora, message, folder, tmp_path, capfd):
    """mlx-lm loads what has a name it knows, without a word about the rest."""
    scored_responses(tmp_path / "data")
    assert trains(folder, tmp_path, "first", "--train") == 0
    resume = ("--train", "--resume-adapter-file", str(tmp_path / "first" / "adapters.safetensors"))
    assert trains(folder, tmp_path, "again", *resume) == 0
    capfd.readouterr()
    assert trains(folder, tmp_path, "other", *resume, *more, lora=lora) == 2
    assert re.search(message, capfd.readouterr().err)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert trains(folder, tmp_path, "junk", "--train", "--resume-adapter-file", str(tmp_path / "junk.safetensors")) == 2
    assert "junk.safetensors' cannot be read" in capfd.readouterr().err


@pytest.mark.parametrize(("wrong", "row"), [(999, "responses"), (-1, "responses"), (96, "prompt_ids")])
def test_ids_that_the_model_does_not_have_are_refused(wrong, row, folder, tmp_path, capfd):
    data = scored_responses(tmp_path / "data")
    given = {"prompt": "a", "responses": [[7, 8], [9]], "rewards": [1, 0]}
    given |= {"prompt_ids": [5, wrong]} if row == "prompt_ids" else {"responses": [[7, wrong], [9]]}
    (data / "train.jsonl").write_text(json.dumps(given) + "\n")
    assert trains(folder, tmp_path, "ids", "--train") == 2
    assert f"group 0 holds {wrong}, which is not a token id of the model (0 to 95)" in capfd.readouterr().err


def test_keys_that_name_no_layer_are_refused(folder, tmp_path, capfd):
    scored_responses(tmp_path / "data")
    lora = "{rank: 2, dropout: 0.0, scale: 4.0, keys: [self_attn.q_prj]}"
    assert trains(folder, tmp_path, "keys", "--train", lora=lora) == 2
    assert "no parameter of the model is trainable: check lora_parameters' keys" in capfd.readouterr().err


def test_full_training_of_quantized_weights_is_refused(tmp_path, capfd):
    whole = tiny_models.write_model("llama", tmp_path / "whole", hidden_size=64, intermediate_size=128)
    convert(str(whole), str(tmp_path / "q4"), quantize=True, q_bits=4, q_group_size=32)
    scored_responses(tmp_path / "data")
    assert trains(tmp_path / "q4", tmp_path, "full", "--train", "--fine-tune-type", "full") == 2
    assert "has quantized weights, which take no gradient: use lora or dora" in capfd.readouterr().err


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch, capfd):
    def nothing(*_, **__):
        raise OSError("no network\x1b]52;c;aGk=\x07")

    monkeypatch.setattr("mlx_lm.utils.snapshot_download", nothing)
    assert main(["--model", "org/name", "--train"]) == 2
    assert "model = 'org/name': there is no such folder, and the hub has none: no network\\x1b]52" in (
        error := capfd.readouterr().err
    )
    assert not {"\x1b", "\x07"} & set(error)
