"""What GVPOTrainer refuses at its start, each with its name and what to set, and a short run that learns."""

import re

import numpy as np
import pytest
import tiny_models
from required import require

require("trl", "datasets", "peft", subject="trl")

import torch
import trl_runs
from gvpo_trl import HOST, GVPOConfig
from gvpo_trl.trainer import total_rewards
from trl import GRPOConfig

pytestmark = pytest.mark.filterwarnings("default")  # TRL and transformers warn about each other's names

ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "max_completion_length": 6}
SIZES = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
REFUSED = {
    "beta": -0.1,
    "temperature": 0.0,
    "num_generations_eval": 1,
    "max_completion_length": None,
    "reward_weights": [float("nan")],
    "loss_type": "dapo",
    "scale_rewards": "group",
    "multi_objective_aggregation": "normalize_then_sum",
    "importance_sampling_level": "sequence",
    "vllm_importance_sampling_correction": True,
    "epsilon": 0.1,
    "epsilon_high": 0.28,
    "delta": 1.5,
    "off_policy_mask_threshold": 0.5,
    "top_entropy_quantile": 0.2,
    "entropy_coef": 0.01,
    "use_adaptive_entropy": True,
    "router_aux_loss_coef": 0.001,
    "accelerator_config": {"split_batches": True},
    "disable_dropout": False,
    "neftune_noise_alpha": 5.0,
    "optim": "lomo",
    "steps_per_generation": 3,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.05,
    "vllm_structured_outputs_regex": "[ab]+",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_with_its_name(name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"\n{name} is .*set") as caught:
        GVPOConfig(str(tmp_path), **(ON_CPU | SIZES | {name: REFUSED[name]}))
    assert str(caught.value).count("\n") == 1, "one setting, one line"


@pytest.mark.parametrize("beta", [None, "0.1", float("inf"), float("nan")])
def test_a_beta_that_is_not_finite_is_refused(beta, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"\nbeta is {beta!r}; set it to a finite number of at least 0"):
        GVPOConfig(str(tmp_path), **ON_CPU, **SIZES, beta=beta)


def test_every_rule_has_a_refused_value() -> None:
    from gvpo_trl.config import RULES

    assert {rule.name for rule in RULES} <= REFUSED.keys()
    GVPOConfig("", **(ON_CPU | SIZES))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 5),
        ("typical_p", 0.5),
        ("no_repeat_ngram_size", 2),
        ("do_sample", False),
        ("min_new_tokens", 3),
        ("sequence_bias", [[[5], float("-inf")]]),
    ],
)
def test_sampling_that_cuts_the_support_is_refused_wherever_it_is_set(name, value, folder, tmp_path) -> None:
    given = ON_CPU | SIZES | {"generation_kwargs": {name: value}}
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(str(value))}; .*allow_truncated_support=True"):
        GVPOConfig(str(tmp_path), **given)
    assert GVPOConfig(str(tmp_path), **given, allow_truncated_support=True).generation_kwargs == {name: value}
    GVPOConfig(str(tmp_path), **(given | {"generation_kwargs": {"repetition_penalty": 1.1}}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 0, "temperature is 0; set it to more than 0"),
        ("temperature", 0.0, "temperature is 0.0; set it to more than 0"),
        ("num_return_sequences", 2, "num_return_sequences is 2; unset it"),
        ("eos_token_id", [5], r"eos_token_id is \[5\]; set it in the model's generation_config"),
        ("stop_strings", ["a"], r"stop_strings is \['a'\]; unset it"),
    ],
)
def test_generation_that_gives_no_group_is_refused(name, value, message, folder, tmp_path) -> None:
    given = ON_CPU | SIZES | {"allow_truncated_support": True}
    with pytest.raises(ValueError, match=rf"settings:\n{message}"):
        GVPOConfig(str(tmp_path), **given, generation_kwargs={name: value})
    GVPOConfig(str(tmp_path), **given, generation_kwargs={"temperature": 0.7, "num_return_sequences": 1})


def test_a_models_own_number_of_responses_is_refused(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="generation_config does not fit GVPO:\nnum_return_sequences is 2; unset it"):
        trl_runs.make_trainer(folder, tmp_path, generation={"num_return_sequences": 2}, **SIZES)


@pytest.mark.parametrize("moved", [0.0, 0.1])
def test_a_model_that_differs_from_its_reference_is_warned_of(moved, folder, tmp_path, recwarn) -> None:
    trainer = trl_runs.make_trainer(folder, tmp_path, moved=moved, max_steps=1, **SIZES)
    found = [str(w.message) for w in recwarn if "from which TRL has loaded the reference" in str(w.message)]
    assert len(found) == (moved > 0)
    assert all(str(folder) in text and "model.norm.weight differs" in text for text in found)
    if moved:
        trainer.train()
        assert abs(trainer.state.log_history[0]["gvpo/kl"]) > 1e-3


def test_a_response_missing_one_of_several_rewards_leaves_its_group() -> None:
    none = float("nan")
    rewards = torch.tensor([[1.0, 5], [2, none], [3, 5], [4, 5], [1, none], [2, none], [none, none], [3, none]])
    total = total_rewards(rewards, torch.tensor([1.0, 2.0]), 4)
    np.testing.assert_array_equal(total, [11, none, 13, 14, 1, 2, none, 3])


def test_a_run_counts_the_responses_without_one_of_two_scores(folder, tmp_path) -> None:
    ones = lambda completions, **_: [float(i) for i in range(len(completions))]
    fives = lambda completions, **_: [None if i == 1 else 5.0 for i in range(len(completions))]
    trainer = trl_runs.make_trainer(folder, tmp_path, reward_funcs=[ones, fives], max_steps=1, **SIZES)
    trainer.train()
    np.testing.assert_array_equal(trainer._gvpo_rewards, [5, float("nan"), *range(7, 13)])
    assert trainer.state.log_history[0]["gvpo/responses/unscored"] == 1


def test_groups_cut_between_the_steps_of_a_generation_are_refused(tmp_path) -> None:
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_generations": 4}
    with pytest.raises(ValueError, match=r"has 2 responses per optimizer step .* set them so that num_generations"):
        GVPOConfig(str(tmp_path), **(ON_CPU | cut | {"steps_per_generation": 4}))


def test_all_that_is_wrong_is_reported_at_once(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"loss_type is 'grpo'(.|\n)*epsilon_high is 0.3(.|\n)*top_p is 0.5"):
        GVPOConfig(str(tmp_path), **ON_CPU, **SIZES, loss_type="grpo", epsilon_high=0.3, top_p=0.5)


def test_a_setting_changed_afterwards_is_refused_at_the_trainers_start(folder, tmp_path) -> None:
    from gvpo_trl import GVPOTrainer

    changed = GVPOConfig(str(tmp_path), **ON_CPU, **SIZES)
    changed.loss_type = "bnpo"
    with pytest.raises(ValueError, match="loss_type is 'bnpo'; set it to \"dr_grpo\""):
        GVPOTrainer(str(folder), trl_runs.rewards, changed)
    with pytest.raises(TypeError, match=r"args is a GRPOConfig; expected a gvpo_trl\.GVPOConfig"):
        GVPOTrainer(str(folder), trl_runs.rewards, GRPOConfig(str(tmp_path), **ON_CPU, **SIZES))


@pytest.mark.parametrize("found", ["1.15.2", "1.17.0", "2.0"])
def test_another_version_of_the_host_is_refused(found: str) -> None:
    with pytest.raises(ImportError, match=rf"trl {found} is installed; gvpo_trl was tried with >=1.16,<1.17"):
        HOST.check(found)


def test_a_model_that_drops_activations_is_refused(tmp_path) -> None:
    dropping = tiny_models.make_model("llama", tmp_path / "model", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"disable_dropout leaves LlamaAttention\.attention_dropout = 0\.1"):
        trl_runs.make_trainer(dropping, tmp_path, **SIZES)


def test_a_models_own_generation_settings_are_refused(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="generation_config does not fit GVPO:\nno_repeat_ngram_size is 3"):
        trl_runs.make_trainer(folder, tmp_path, generation={"no_repeat_ngram_size": 3, "top_k": 7}, **SIZES)


def test_a_group_of_several_prompts_is_refused(folder, tmp_path) -> None:
    """As where each process reads shards of its own of a stream: TRL counts groups off by their places."""
    trainer = trl_runs.make_trainer(folder, tmp_path, **SIZES)
    trainer._get_train_sampler = torch.utils.data.SequentialSampler
    with pytest.raises(RuntimeError, match="the rows of a group of 4 have different prompts"):
        trainer.train()


@pytest.mark.parametrize("name", ["split_batches", "even_batches"])
def test_batches_that_accelerate_deals_otherwise_are_refused(name, tmp_path) -> None:
    dealt = {"accelerator_config": {name: name == "split_batches"}}
    with pytest.raises(ValueError, match="set it to one with split_batches=False and even_batches=True"):
        GVPOConfig(str(tmp_path), **(ON_CPU | SIZES | dealt))


def test_a_generation_without_a_reward_stops_the_run(folder, tmp_path) -> None:
    nothing = lambda completions, **_: [None] * len(completions)
    trainer = trl_runs.make_trainer(folder, tmp_path, reward_funcs=nothing, **SIZES)
    with pytest.raises(RuntimeError, match="no group has 2 scored completions: 0 of 8 have a reward"):
        trainer.train()


def test_an_infinite_reward_is_named_with_its_function(folder, tmp_path) -> None:
    def beyond(completions, **_):
        return [1e39, *[0.0] * (len(completions) - 1)]

    trainer = trl_runs.make_trainer(folder, tmp_path, reward_funcs=[trl_runs.rewards, beyond], **SIZES)
    with pytest.raises(FloatingPointError, match="reward function beyond returned an infinite reward"):
        trainer.train()


def test_a_tokenizer_without_an_end_token_is_refused(folder, tmp_path, monkeypatch) -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.eos_token = None
    monkeypatch.setattr(tiny_models, "make_tokenizer", lambda: tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        trl_runs.make_trainer(folder, tmp_path, **SIZES)


def test_evaluation_weighs_too(folder, tmp_path) -> None:
    trainer = trl_runs.make_trainer(folder, tmp_path, per_device_eval_batch_size=8, **SIZES)
    found = trainer.evaluate(trainer.train_dataset)
    parts = found["eval_gvpo/implicit_variance"] + found["eval_gvpo/reward_variance"]
    assert parts - 2 * found["eval_gvpo/covariance"] == pytest.approx(found["eval_loss"], rel=1e-3)


def test_a_run_continues_from_a_checkpoint_amid_a_generation(folder, tmp_path) -> None:
    settings = SIZES | {"steps_per_generation": 4, "save_strategy": "steps", "save_steps": 3, "max_steps": 5}
    trl_runs.make_trainer(folder, tmp_path, **settings).train()
    again = trl_runs.make_trainer(folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [line["step"] for line in again.state.log_history if "gvpo/kl" in line] == [1, 2, 3, 4, 5]
    assert "GVPO" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_reward_rises(folder, tmp_path) -> None:
    wanted = set(range(20, 58))
    share = lambda completion_ids, **_: [sum(t in wanted for t in ids) / len(ids) for ids in completion_ids]
    trainer = trl_runs.make_trainer(
        folder,
        tmp_path,
        reward_funcs=share,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_generations=8,
        optim="adamw_torch",
        learning_rate=0.01,
        max_grad_norm=1.0,
        beta=0.02,
        max_steps=20,
    )
    assert trainer.args.temperature == 1.0 == trainer.temperature
    trainer.train()
    reward = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    kl = [line["gvpo/kl"] for line in trainer.state.log_history if "reward" in line]
    assert sum(reward[:3]) / 3 < 0.6
    assert sum(reward[-3:]) / 3 > 0.85
    assert abs(kl[0]) < 1e-4
    assert kl[-1] > 0.5
