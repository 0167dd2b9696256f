"""GVPOTrainer's reference is the model before training and stays so, whatever adapters it has; or it is refused."""

import warnings

import pytest
import tiny_models
from required import require

require("trl", "datasets", "peft", subject="trl")

import peft
import torch
import trl_runs
from gvpo_trl import GVPOConfig, GVPOTrainer, scoring
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names

SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"), attention_bias=True)


def trainer_of(model, out, peft_config=None, **settings) -> GVPOTrainer:
    from datasets import Dataset

    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "max_completion_length": 6, "disable_tqdm": True}
    fixed |= {"save_strategy": "no", "logging_steps": 1, "learning_rate": 0.05, "gradient_checkpointing": False}
    return GVPOTrainer(
        model=model,
        reward_funcs=trl_runs.rewards,
        args=GVPOConfig(str(out), **(fixed | SIZES | settings)),
        train_dataset=Dataset.from_dict({"prompt": trl_runs.PROMPTS}),
        processing_class=tiny_models.make_tokenizer(),
        peft_config=peft_config,
    )


def loaded(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)


def ref_scores(trainer) -> list[torch.Tensor]:
    with torch.no_grad(), trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
        return scoring.padded_scores(trainer, trainer.model)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_weights_is_refused(start, folder, tmp_path) -> None:
    config = peft.LoraConfig(**LORA, init_lora_weights=start)
    with pytest.raises(ValueError, match=rf"init_lora_weights is '{start}', which changes the base weights"):
        trainer_of(loaded(folder), tmp_path, config)
    assert trainer_of(loaded(folder), tmp_path, config, beta=0.0).beta == 0.0, "without a reference it is not asked for"


def test_such_an_adapter_is_refused_where_16_bits_hide_the_change(tmp_path) -> None:
    small = tiny_models.make_model("llama", tmp_path / "model", spread=0.01)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="init_lora_weights is 'pissa', which changes the base weights"):
        trainer_of(model, tmp_path, peft.LoraConfig(**LORA, init_lora_weights="pissa"))


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_an_adapter_that_starts_as_the_model_has_it_as_its_reference(start, folder, tmp_path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(loaded(folder), tmp_path, peft.LoraConfig(**LORA, init_lora_weights=start), max_steps=2)
    assert not [w for w in caught if "does not start at 0" in str(w.message)]
    before = ref_scores(trainer)
    trainer.train()
    kl = [line["gvpo/kl"] for line in trainer.state.log_history if "gvpo/kl" in line]
    assert abs(kl[0]) < 1e-4 < abs(kl[1])
    assert all(torch.equal(a, b) for a, b in zip(before, ref_scores(trainer), strict=True))


def test_an_adapter_that_starts_elsewhere_is_warned_of(folder, tmp_path) -> None:
    with pytest.warns(UserWarning, match="the new LoraConfig adapter changes the model before it is trained"):
        trainer_of(loaded(folder), tmp_path, peft.LoraConfig(**LORA, init_lora_weights=False))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_training_would_move_in_the_reference_are_refused(bias, folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"training .*q_proj\.base_layer\.bias would change the reference too"):
        trainer_of(loaded(folder), tmp_path, peft.LoraConfig(**LORA, bias=bias))


def test_weights_beside_an_adapter_that_would_move_the_reference_are_refused(folder, tmp_path) -> None:
    model = peft.get_peft_model(loaded(folder), peft.LoraConfig(**LORA))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"training .*model\.norm\.weight would change the reference too"):
        trainer_of(model, tmp_path)


def test_a_copy_of_a_module_in_the_adapter_leaves_the_reference(folder, tmp_path) -> None:
    trainer = trainer_of(
        loaded(folder), tmp_path, peft.LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]), max_steps=1
    )
    before = ref_scores(trainer)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, ref_scores(trainer), strict=True))
    scoring.check_scores(trainer)


@pytest.mark.parametrize("which", ["another name", "another one active"])
def test_an_active_adapter_that_is_not_the_reference_is_refused(which, folder, tmp_path) -> None:
    first = "mine" if which == "another name" else "default"
    model = peft.get_peft_model(loaded(folder), peft.LoraConfig(**LORA), adapter_name=first)
    if which == "another one active":
        model.add_adapter("mine", peft.LoraConfig(**LORA))
        model.set_adapter("mine")
    with pytest.raises(ValueError, match="the active adapter is mine, and TRL takes the reference from"):
        trainer_of(model, tmp_path)


@pytest.mark.parametrize("which", ["adapter", "model"])
def test_a_model_without_trainable_parameters_is_refused(which, folder, tmp_path) -> None:
    model = loaded(folder)
    if which == "adapter":
        peft.get_peft_model(model, peft.LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
        model = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter")  # is_trainable=False, its default
    else:
        model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of the model is trainable .*is_trainable=True"):
        trainer_of(model, tmp_path)


def test_a_setting_that_the_reference_lacks_is_warned_of(folder, tmp_path) -> None:
    rope = {"rope_type": "default", "rope_theta": 20.0}
    with pytest.warns(UserWarning, match=r"has loaded the reference \(a token's log-prob differs by up to .* nat\)"):
        trainer_of(loaded(folder, rope_parameters=rope), tmp_path)
