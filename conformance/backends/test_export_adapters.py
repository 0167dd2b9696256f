"""Adapters exported alone: peft, mlx-lm and a plain NumPy merge give them the scores of the trained policy."""

import importlib
import importlib.util
import json
import shutil

import numpy as np
import pytest
import tiny_models
import trainer_backends
from batches import batch, train
from trainer_runs import write_run

from gvpo_core.training import cli
from gvpo_core.training.config import ConfigError

PRESENT = trainer_backends.present()
if not PRESENT:
    pytest.skip("no backend of a language model is among the subjects", allow_module_level=True)

PAIRS = [(b, kind) for b in PRESENT for kind in b.lora_kinds]
LORA = {"lora_rank": 3, "lora_alpha": 12, "learning_rate": 0.02}
TARGETS = {"all": ("all-linear",), "two": ("q_proj", "down_proj")}
of_every_kind = pytest.mark.parametrize(
    ("backend", "kind", "targets"),
    [
        # JAX compiles each for 20 s
        pytest.param(b, kind, targets, marks=pytest.mark.slow if (b.name, name) == ("jax", "two") else ())
        for b, kind in PAIRS
        for name, targets in TARGETS.items()
    ],
    indirect=["backend"],
    ids=[f"{b.name}-{kind}-{name}" for b, kind in PAIRS for name in TARGETS],
)


def made(path):
    """A model whose config.json has rope_theta where released ones and mlx-lm have it, too."""
    base = tiny_models.write_model("llama", path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": config["rope_parameters"]["rope_theta"]}))
    return base


def exported(backend, base, out, **settings):
    """A trained policy, and the folder with its adapters."""
    policy = backend.policies.policy(base, **LORA | settings)
    train(policy, range(3))
    out.mkdir()
    policy.export_adapters(out)
    return policy


def by_transformers(base, adapters, of):
    """(N,) float64 log-probs of the responses by peft on transformers' model."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(model, adapters, autocast_adapter_dtype=False).double().eval()

    def logits(ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()

    return scored(logits, of)


def by_mlx_lm(base, adapters, of):
    """(N,) float64 log-probs of the responses by mlx-lm."""
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(base), adapter_path=str(adapters))
    return scored(lambda ids: np.array(model(mx.array([ids]))[0].astype(mx.float32)), of)


def scored(logits, of):
    sums = []
    for prompt, response in zip(of.prompts, of.responses, strict=True):
        rows = logits([*prompt, *response])[len(prompt) - 1 : -1].astype(np.float64)
        rows -= rows.max(1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(1, keepdims=True))
        sums.append(sum(rows[t, token] for t, token in enumerate(response)))
    return np.array(sums)


@pytest.mark.slow_on("jax")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
@of_every_kind
def test_another_library_scores_exported_adapters_as_the_policy(backend, kind, targets, tmp_path):
    base = made(tmp_path / "base")
    policy = exported(backend, base, tmp_path / "out", lora_kind=kind, lora_targets=targets)
    of = batch((3, 3))
    score = by_mlx_lm if backend.name == "mlx" else by_transformers
    if backend.name == "jax" and importlib.util.find_spec("peft") is None:
        score = by_merging
    found, expected = score(base, tmp_path / "out", of), policy.logprobs(of)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - policy.logprobs(of, reference=True)).max() > 1e-2  # the adapters matter


def by_merging(base, adapters, of):
    """(N,) log-probs of the responses by gvpo_jax, on W + alpha/r B A, merged by the equation."""
    from safetensors.numpy import load_file, save_file

    settings = json.loads((adapters / "adapter_config.json").read_text())
    factors = load_file(adapters / "adapter_model.safetensors")
    merged = base.parent / "merged"
    shutil.copytree(base, merged)
    weights = load_file(base / "model.safetensors")
    for name in [name for name in factors if name.endswith("lora_A.weight")]:
        own = name.removeprefix("base_model.model.").replace("lora_A.", "")
        assert own.removesuffix(".weight") in settings["target_modules"]
        scale = settings["lora_alpha"] / settings["r"]
        weights[own] = weights[own] + scale * factors[name.replace("lora_A", "lora_B")] @ factors[name]
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    policies = trainer_backends.BACKENDS["jax"].policies
    return policies.policy(merged).logprobs(of)


def test_the_folder_says_rank_alpha_base_and_layers_and_is_read_back(backend, tmp_path, monkeypatch):
    """Then a writer that spoils the numbers is found by reading the folder back."""
    base, out = made(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    policy = backend.policies.policy(base, **LORA, lora_targets=("q_proj",))
    policy.export_adapters(out)
    settings = json.loads((out / "adapter_config.json").read_text())
    weights = "adapters.safetensors" if backend.name == "mlx" else "adapter_model.safetensors"
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", weights}
    if backend.name == "mlx":
        parameters = settings["lora_parameters"]
        assert (parameters["rank"], parameters["scale"], parameters["keys"]) == (3, 4.0, ["self_attn.q_proj"])
        assert settings["model"] == str(base)
    else:
        assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (3, 12, str(base))
        assert {name.rpartition(".")[2] for name in settings["target_modules"]} == {"q_proj"}
    spoil_the_writer(backend, monkeypatch)
    with pytest.raises(ConfigError, match="read back"):
        policy.export_adapters(out)


def spoil_the_writer(backend, monkeypatch):
    if backend.name == "mlx":
        import mlx.core as mx

        write = mx.save_safetensors
        monkeypatch.setattr(mx, "save_safetensors", lambda path, of: write(path, {n: a + 1 for n, a in of.items()}))
        return
    module = importlib.import_module(f"gvpo_{backend.name}.export")
    write = module.save_file
    changed = lambda of, path, metadata: write({n: a + 1 for n, a in of.items()}, path, metadata)
    monkeypatch.setattr(module, "save_file", changed)


@pytest.mark.slow
def test_the_command_writes_adapters_and_refuses_full_fine_tuning(tmp_path, capfd):
    backend = PRESENT[0]  # the command knows nothing of backends
    base = made(tmp_path / "base")
    for name, rank in (("lora", 2), ("full", 0)):
        config = write_run(tmp_path / name, backend, base, steps=1, extra="", model_extra=f"lora_rank = {rank}")
        assert cli.main(["train", str(config)]) == 0
    assert cli.main(["export", str(tmp_path / "lora" / "run"), str(tmp_path / "out"), "--adapters"]) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "out" / "config.json").exists()
    assert cli.main(["export", str(tmp_path / "full" / "run"), str(tmp_path / "none"), "--adapters"]) == 2
    assert "has no adapters: leave --adapters out" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()
