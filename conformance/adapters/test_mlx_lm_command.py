"""`python -m gvpo_mlx_lm`: from mlx-lm's YAML file to its adapters, and one line for whatever cannot be used."""

import json
import os
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
        (["--model", "here", "--num-layers", "99"], "num_layers = 99, and the model has 2; -1 takes all"),
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
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("gvpo_mlx_lm: ") and message in error and error.count("\n") == 1


def test_a_name_that_the_hub_does_not_give_is_one_line(monkeypatch, capfd):
    def nothing(*_, **__):
        raise OSError("no network\x1b]52;c;aGk=\x07")

    monkeypatch.setattr("mlx_lm.utils.snapshot_download", nothing)
    assert main(["--model", "org/name"]) == 2
    assert "model = 'org/name': there is no such folder, and the hub has none: no network\\x1b]52" in (
        error := capfd.readouterr().err
    )
    assert not {"\x1b", "\x07"} & set(error)
