"""Models that TRL's padded, trained batches would score otherwise than alone: made exact, or rejected by name."""

from pathlib import Path

import pytest
import tiny_models
from required import require

require("trl", "datasets", "peft", subject="trl")

import torch
import trl_runs
from gvpo_trl.scoring import check_scores, padded_scores, rope_of
from transformers import AutoConfig
from trl_checks import check_steps

from gvpo_core.training.policy.layout import RopeByLength

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names

SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 700.0,
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


def long_rope(original: int) -> dict:
    rope = LONGROPE | {"original_max_position_embeddings": original}
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "max_position_embeddings": 128}


@pytest.mark.parametrize("settings", [SIZES, SIZES | {"lora": True}], ids=["full", "LoRA"])
def test_learned_positions_are_those_of_a_row_alone(settings: dict, tmp_path: Path) -> None:
    folder = tiny_models.make_model("gpt2", tmp_path / "model")
    assert {len(prompt) for prompt in trl_runs.PROMPTS} != {1}, "prompts of different lengths are padded on the left"
    found = trl_runs.run(folder, tmp_path / "out", settings | {"max_steps": 2})
    check_steps(folder, found, settings | {"max_steps": 2})


def test_padding_ids_embedding_is_trained_as_any_other(tmp_path: Path) -> None:
    space = tiny_models.make_tokenizer()(" ")["input_ids"][0]
    assert any(" " in prompt for prompt in trl_runs.PROMPTS)
    folder = tiny_models.make_model("llama", tmp_path / "model", pad_token_id=space, tie_word_embeddings=False)
    found = trl_runs.run(folder, tmp_path / "out", SIZES | {"max_steps": 1})
    check_steps(folder, found, SIZES | {"max_steps": 1})
    (step,) = found["steps"]
    name = next(name for name in step if "embed_tokens" in name)
    assert not torch.equal(step[name][space], found["start"][name][space])


@pytest.mark.parametrize(
    ("settings", "sharded"),
    [(SIZES, False), (SIZES, True), (SIZES | {"lora": True}, False)],
    ids=["full", "full-sharded", "LoRA"],
)
def test_a_model_that_trl_cannot_score_is_refused_before_training(
    settings: dict, sharded: bool, tmp_path: Path, monkeypatch
) -> None:
    """TRL takes Llama 4's model with its head for the backbone: AttributeError at the first step.

    Where parameters are in parts (FSDP, DeepSpeed), only a prepared model computes: the first step finds it out.
    """
    if sharded:
        monkeypatch.setattr("gvpo_trl.trainer._WHOLE", ())
    folder = tiny_models.make_model("llama4_text", tmp_path / "model")
    with pytest.raises(ValueError, match=r"TRL cannot score Llama4ForCausalLM \(AttributeError: "):
        trl_runs.run(folder, tmp_path / "out", settings | {"max_steps": 1})


def test_longrope_within_its_original_length_is_exact(tmp_path: Path) -> None:
    folder = tiny_models.make_model("llama", tmp_path / "model", **long_rope(64))
    found = trl_runs.run(folder, tmp_path / "out", SIZES | {"max_steps": 1})
    check_steps(folder, found, SIZES | {"max_steps": 1})


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_batch_beyond_the_original_length_of_its_rope_is_rejected(kind: str, tmp_path: Path) -> None:
    dynamic = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 4.0},
        "max_position_embeddings": 8,
    }
    folder = tiny_models.make_model("llama", tmp_path / "model", **(long_rope(8) if kind == "longrope" else dynamic))
    trainer = trl_runs.make_trainer(folder, tmp_path / "out", **SIZES)
    assert rope_of(trainer.model) == RopeByLength(kind, 8)
    before = trl_runs.trained(trainer.model)
    with pytest.raises(RuntimeError, match=rf"rope_type is '{kind}' and a batch is padded to \d+ tokens: beyond 8"):
        trainer.train()
    after = trl_runs.trained(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before), "no step was taken"


def test_router_jitter_is_rejected_by_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    changes = {"router_jitter_noise": 0.2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    settings = tiny_models.SMALL | {"initializer_range": 0.3} | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **settings))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"MixtralSparseMoeBlock\.jitter_noise = 0\.2.*: load it with these set to 0"):
        trl_runs.make_trainer(tmp_path / "model", tmp_path / "out", **SIZES)


@pytest.mark.parametrize("at_random", [True, False], ids=["random numbers", "another head"])
def test_a_model_that_scores_otherwise_in_training_is_rejected(at_random: bool, tmp_path: Path) -> None:
    folder = tiny_models.make_model("llama", tmp_path / "model")
    trainer = trl_runs.make_trainer(folder, tmp_path / "out", **SIZES)
    check_scores(trainer)
    if at_random:
        noisy = lambda module, args, out: out + 1e-9 * torch.rand_like(out) if module.training else out
        trainer.model.model.layers[0].mlp.register_forward_hook(noisy)
        message = "LlamaForCausalLM draws random numbers in training mode"
    else:
        trainer.model.lm_head.register_forward_hook(lambda module, args, out: 1.1 * out)
        message = "LlamaForCausalLM scores tokens differently in TRL's padded batches, by up to"
    with pytest.raises(ValueError, match=message):
        check_scores(trainer)


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_recurrent_gemma_whose_state_passes_through_padding_is_rejected(precision: str, tmp_path: Path) -> None:
    """In 16 bits its scores change by less than bf16 numbers round by, and every step would be a little wrong."""
    from transformers import AutoModelForCausalLM

    settings = {"block_types": ("recurrent", "attention"), "attention_window_size": 6, "lru_width": 32}
    config = AutoConfig.for_model("recurrent_gemma", **tiny_models.SMALL | settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_models.make_tokenizer().save_pretrained(tmp_path / "model")
    options = (
        {"bf16": True} if precision == "autocast" else {"dtype": torch.bfloat16} if precision == "bfloat16" else {}
    )
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM lets padding change the scores of a row"):
        trl_runs.make_trainer(tmp_path / "model", tmp_path / "out", **SIZES, **options)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_padding_changes_no_score_in_16_bits(kind: str, tmp_path: Path) -> None:
    folder = tiny_models.make_model(kind, tmp_path / "model")
    trainer = trl_runs.make_trainer(folder, tmp_path / "out", dtype=torch.bfloat16, **SIZES)
    assert next(trainer.model.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        one, other = (padded_scores(trainer, trainer.model, padding) for padding in (0, 1))
    assert torch.equal(torch.cat(one), torch.cat(other))


def test_the_check_leaves_modes_and_random_numbers_alone(tmp_path: Path) -> None:
    folder = tiny_models.make_model("llama", tmp_path / "model")
    trainer = trl_runs.make_trainer(folder, tmp_path / "out", **SIZES)
    trainer.model.train()
    trainer.model.model.layers[0].eval()
    modes, state = [module.training for module in trainer.model.modules()], torch.get_rng_state()
    check_scores(trainer)
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow_on("8")
@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_quantized_weights_train(bits: int, tmp_path: Path) -> None:
    """Quantized layers round by what is in a batch: their scores alone and padded are compared as 16-bit ones."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128}
    folder = tiny_models.make_model("llama", tmp_path / "model", **sizes)
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    )
    assert {p.dtype for p in quantized.parameters()} > {torch.uint8 if bits == 4 else torch.int8}
    trainer = trl_runs.make_trainer(folder, tmp_path / "out", model=quantized, lora=True, max_steps=2, **SIZES)
    trainer.train()
    kl = [line["gvpo/kl"] for line in trainer.state.log_history if "gvpo/kl" in line]
    assert abs(kl[0]) < 1e-3 < abs(kl[1])
