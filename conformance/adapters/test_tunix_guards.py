"""What gvpo_tunix mends in Tunix, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from required import require

require("tunix", subject="tunix")

import gvpo_tunix
import jax
import jax.numpy as jnp
import optax
import tunix_runs as runs
from gvpo_tunix import GVPOConfig, GVPOLearner, SettingsError, check_rope, mend_llama, rope
from gvpo_tunix.config import check_cluster
from gvpo_tunix.folder import check_config, check_files
from gvpo_tunix.learner import _WholeSteps
from gvpo_tunix.objective import GVPORewardManager, centred_rewards
from safetensors.numpy import load_file, save_file
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params
from tunix.rl import rl_cluster
from tunix.rl.rollout.base_rollout import RolloutConfig

from gvpo_core.training.improve import NoSignalError

pytestmark = pytest.mark.filterwarnings("default")  # Tunix and flax warn about themselves


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return runs.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def learner(folder):
    made = runs.cluster(folder, optimizer=optax.sgd(0.02), training={}, rollout={"max_tokens_to_generate": 12})
    return GVPOLearner(made, GVPOConfig(num_generations=4), runs.vowels, model_path=folder)


def sample(learner, prompts=("say a:",) * 4 + ("e",) * 4):
    return learner._generate_and_compute_advantage({"prompts": np.array(prompts), "trajectory_ids": list(prompts)})


def test_samples_keep_their_end_token_and_masks_are_of_lengths(learner):
    """The end token is the padding token too: Tunix's mask, ids != pad, would leave it out."""
    outputs = []
    generate = learner.rl_cluster.generate
    learner.rl_cluster.generate = lambda **options: outputs.append(generate(**options)) or outputs[-1]
    examples = [sample(learner) for _ in range(3)]
    learner.rl_cluster.generate = generate
    cut = [row for output in outputs for row in output.tokens]
    masks = np.concatenate([np.asarray(example.completion_mask) for example in examples])
    ids = np.concatenate([np.asarray(example.completion_ids) for example in examples])
    lengths = [len(row) + (len(row) < 12) for row in cut]
    assert masks.sum(axis=1).tolist() == lengths
    assert 0 < sum(len(row) < 12 for row in cut) < len(cut)
    for row, mask, length in zip(ids, masks, lengths, strict=True):
        assert mask[:length].all()
        assert 0 not in row[: length - 1]
    prompts = np.asarray(examples[0].prompt_ids)
    assert (np.asarray(examples[0].prompt_mask) == (prompts != 0)).all()


def test_every_call_has_a_seed_of_its_own(learner):
    config = learner.rl_cluster.get_rollout_config(rl_cluster.Mode.TRAIN)
    one, two = sample(learner), sample(learner)
    assert (np.asarray(one.completion_ids) != np.asarray(two.completion_ids)).any()
    raw = [learner.rl_cluster.generate(prompts=["say a:"] * 4).tokens for _ in range(2)]
    assert all((a == b).all() for a, b in zip(*raw, strict=True)), "Tunix samples anew itself: the mend can go"
    assert config.seed is None
    for given in (3, jax.random.PRNGKey(3), jax.random.key(3)):
        assert learner._seed(given) != learner._seed(given)


def test_the_reference_is_scored_at_temperature_1(learner, folder):
    config = learner.rl_cluster.get_rollout_config(rl_cluster.Mode.TRAIN)
    assert config.temperature == 1.3
    example = sample(learner)
    mask, prompt_mask = np.asarray(example.completion_mask), np.asarray(example.prompt_mask)
    rows = zip(np.asarray(example.completion_ids), mask, strict=True)
    responses = [tuple(row[m].tolist()) for row, m in rows]
    rows = zip(np.asarray(example.prompt_ids), prompt_mask, strict=True)
    prompts = [tuple(row[m].tolist()) for row, m in rows]
    expected = np.asarray(runs.logprobs(runs.load(folder), prompts, responses))
    found = (np.asarray(example.ref_per_token_logps) * mask).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert config.temperature == 1.3


def test_a_prompt_that_tunix_would_mask_is_refused(learner):
    with pytest.raises(SettingsError, match=r"'a<\|end\|>b' holds the padding token, id 0"):
        sample(learner, ("a<|end|>b",) * 4)


def test_a_list_of_prompts_is_refused(learner):
    with pytest.raises(SettingsError, match="a prompt is a ndarray; expected text"):
        learner._generate_and_compute_advantage({"prompts": [np.array(["a", "a"])]})


def test_a_sampled_padding_token_takes_the_score(learner, monkeypatch):
    """With a padding token of its own, which the model may sample: Tunix would hide it from the model."""
    monkeypatch.setattr(learner.rl_cluster.rollout, "pad_id", lambda: 5)
    output = SimpleNamespace(
        text=["a", "b", "c", "d"],
        tokens=[np.array(row) for row in ([9, 5, 8], [9, 8], [7] * 12, [7] * 11 + [5])],
        left_padded_prompt_tokens=np.array([[5, 7, 8]] * 4),
    )
    monkeypatch.setattr(learner.rl_cluster, "generate", lambda **_: output)
    samples = learner._sample(["xy"] * 4, rl_cluster.Mode.TRAIN)
    assert samples.usable.tolist() == [False, True, True, False]
    assert samples.finished.tolist() == [True, True, False, False]
    assert samples.mask.sum(axis=1).tolist() == [4, 3, 12, 12]
    assert samples.prompt_mask.tolist() == [[False, True, True]] * 4


def test_missing_rewards_are_not_zero():
    """Tunix adds NaN as 0; a reward of several that is missing leaves the response without a score."""
    one = lambda prompts, completions, **_: [1.0, None, 3.0]
    two = lambda prompts, completions, **_: [0.5, 0.5, float("nan")]
    manager = GVPORewardManager([one, two], GVPOConfig())
    found = manager(prompts=["a"] * 3, completions=["b"] * 3)["rewards"]
    np.testing.assert_array_equal(found, [1.5, np.nan, np.nan])
    np.testing.assert_allclose(centred_rewards(np.array([1.0, np.nan, 3.0]), 3), [-1.0, np.nan, 1.0])
    with pytest.raises(ValueError, match="gave 1 rewards for 2 responses"):
        GVPORewardManager(lambda **_: [1.0], GVPOConfig())(prompts=["a"] * 2, completions=["b"] * 2)


@pytest.mark.parametrize("reward", [float("inf"), -float("inf")])
def test_an_infinite_reward_is_refused(reward):
    """It would leave no finite mean in its group, which would then leave the step."""

    def vast(prompts, completions, **_):
        return [1.0, reward, None]

    with pytest.raises(ValueError, match=rf"vast gave {reward} for 'c'; expected a finite reward, or None"):
        GVPORewardManager([vast], GVPOConfig())(prompts=["a"] * 3, completions=["b", "c", "d"])


def test_weights_that_are_not_the_models_are_refused(learner, folder, tmp_path):
    """Tunix takes tensors from every *.safetensors of a folder, in the order in which the file system has them."""
    shutil.copytree(folder, tmp_path / "model")
    check_files(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    other = tensors.pop("model.norm.weight") + 1
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    save_file({"model.norm.weight": other}, tmp_path / "model" / "other.safetensors")
    found = np.asarray(runs.load(tmp_path / "model").final_norm.w[...])
    np.testing.assert_array_equal(found, other, "Tunix leaves others alone: the check can go")
    with pytest.raises(SettingsError, match=r"has other\.safetensors beside model\.safetensors: Tunix reads all"):
        GVPOLearner(learner.rl_cluster, learner.algo_config, runs.vowels, model_path=tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"config\.num_layers is 1, and .* has num_hidden_layers = 2: make the model with"),
        ({"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4}, r"config\.num_heads is 4, and .* = 8"),
        ({"head_dim": None, "hidden_size": 64}, r"config\.head_dim is 8, and .* has head_dim = 16"),
        ({"rms_norm_eps": 1e-5}, r"config\.norm_eps is 1e-06, and .* has rms_norm_eps = 1e-05"),
        ({"tie_word_embeddings": True}, r"config\.weight_tying is False, and .* has tie_word_embeddings = True"),
        ({"hidden_act": "gelu"}, "has hidden_act = 'gelu', and Tunix's Llama3 computes silu"),
        ({"attention_bias": True}, "has attention_bias = true, and Tunix's Llama3 leaves these biases out"),
        ({"sliding_window": 6}, "has sliding_window = 6, and Tunix's Llama3 has no window"),
    ],
)
def test_a_model_that_is_not_the_folders_is_refused(changes, message, folder, learner, tmp_path):
    """Tunix makes each of these models of the folder's weights, as the test after this one shows of two."""
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=message):
        GVPOLearner(learner.rl_cluster, learner.algo_config, runs.vowels, model_path=tmp_path / "model")
    check_config(runs.load(folder), folder)


def test_a_reference_of_another_configuration_is_refused(folder, learner, monkeypatch):
    other = runs.load(folder, theta=50.0)
    monkeypatch.setattr(learner.rl_cluster.inference_worker, "get_model", lambda name: other)
    with pytest.raises(SettingsError, match=r"the actor's config\.rope_theta is 700\.0 and the reference's 50\.0"):
        GVPOLearner(learner.rl_cluster, learner.algo_config, runs.vowels, model_path=folder)
    GVPOLearner(learner.rl_cluster, GVPOConfig(num_generations=4, beta=0.0), runs.vowels, model_path=folder)


def test_tunix_takes_weights_into_another_model(folder):
    """If it refuses them one day, these checks can go."""
    one = runs.load(folder)
    config = dataclasses.replace(one.config, num_heads=8, head_dim=4, num_kv_heads=4, norm_eps=1e-2)
    params.create_model_from_safe_tensors(str(folder), config, runs.mesh(), dtype=jnp.float32)


def test_an_index_says_which_files_are_the_models(tmp_path):
    for name in ("model-1-of-2", "model-2-of-2", "adapter_model"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    check_files(tmp_path)  # nothing to compare with
    weights = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(SettingsError, match=r"has adapter_model\.safetensors beside what model\.safetensors\.index"):
        check_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    check_files(tmp_path)


def test_a_mini_batch_without_signal_is_an_error_that_ends_the_queue():
    queue = []
    held = _WholeSteps(SimpleNamespace(put=queue.append), 1, 1, k=2)
    held.put([SimpleNamespace(advantages=jnp.asarray([0.0, jnp.nan]))])
    with pytest.raises(NoSignalError, match="no group of the mini-batch has two scored responses"):
        held.put(None)
    assert queue == [None]


def llama_in_numpy(folder: Path, ids: list[int]) -> np.ndarray:
    """(T, V) logits of the folder's one-layer Llama, float64, written out."""
    from safetensors.numpy import load_file

    w = {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}
    norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[name]
    at = "model.layers.0."
    x = w["model.embed_tokens.weight"][ids]
    h = norm(x, at + "input_layernorm.weight")
    q, k, v = ((h @ w[f"{at}self_attn.{n}_proj.weight"].T).reshape(len(ids), -1, 8) for n in "qkv")
    angle = np.arange(len(ids))[:, None] / runs.THETA ** (np.arange(4) / 4)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    turn = lambda y: np.concatenate([y[..., :4] * cos - y[..., 4:] * sin, y[..., 4:] * cos + y[..., :4] * sin], axis=-1)
    q, k = turn(q), turn(k)
    heads = []
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].T / np.sqrt(8)
        scores[np.triu_indices(len(ids), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // 2])
    x = x + np.concatenate(heads, axis=-1) @ w[at + "self_attn.o_proj.weight"].T
    h = norm(x, at + "post_attention_layernorm.weight")
    gate = h @ w[at + "mlp.gate_proj.weight"].T
    x = x + gate / (1 + np.exp(-gate)) * (h @ w[at + "mlp.up_proj.weight"].T) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def test_llama_turns_with_its_own_theta_once_mended(folder, monkeypatch):
    ids = [5, 17, 80, 3, 44, 9, 61, 23]
    expected = llama_in_numpy(folder, ids)
    model = runs.load(folder)
    positions, causal = jnp.arange(len(ids))[None], jnp.asarray(np.tril(np.ones((1, len(ids), len(ids)), dtype=bool)))
    logits = lambda: np.asarray(model(jnp.asarray([ids]), positions, None, causal)[0][0])
    monkeypatch.setattr(llama.Attention, "block", rope._block)
    assert np.abs(logits() - expected).max() > 0.01, "Tunix's Llama passes its theta on: the mend can go"
    assert mend_llama()
    assert not mend_llama()
    np.testing.assert_allclose(logits(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope_theta is 700.0, and .* for 500:"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 700.0}}, "rope_type 'llama3'.* no RoPE scaling"),
        (None, "has no config.json"),
    ],
)
def test_a_folder_of_another_rope_is_refused(config, message, folder, tmp_path):
    if config is not None:
        changed = json.loads((folder / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(SettingsError, match=message):
        check_rope(SimpleNamespace(config=SimpleNamespace(rope_theta=700.0)), tmp_path)


def test_a_model_without_theta_is_refused(folder):
    with pytest.raises(SettingsError, match="has no rope_theta to compare"):
        check_rope(SimpleNamespace(config=SimpleNamespace()), folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.1}, "epsilon = 0.1: GVPO has no ratio"),
        ({"loss_agg_mode": "token-mean"}, "loss_agg_mode = 'token-mean'"),
        ({"loss_algo": "gspo-token"}, "loss_algo"),
        ({"kl_clamp_value": 10.0}, "kl_clamp_value"),
        ({"policy_loss_fn": "grpo"}, "policy_loss_fn = 'grpo'"),
        ({"num_generations": 1}, "num_generations = 1"),
        ({"num_iterations": 0}, "num_iterations = 0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": "0.1"}, "beta is '0.1'; expected a finite number"),
        ({"beta": None}, "beta is None; expected a finite number"),
    ],
)
def test_refused_algorithm_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        GVPOConfig(**settings)


def fake_cluster(*, training=None, rollout=None, reference=True, engine="vanilla"):
    def get_model(role):
        if not reference:
            raise ValueError("no such model")

    settings = rl_cluster.RLTrainingConfig(
        **({"actor_optimizer": optax.sgd(1.0), "eval_every_n_steps": 1} | (training or {}))
    )
    config = SimpleNamespace(
        training_config=settings, rollout_config=RolloutConfig(**(rollout or {})), rollout_engine=engine
    )
    return SimpleNamespace(cluster_config=config, inference_worker=SimpleNamespace(get_model=get_model))


@pytest.mark.parametrize(
    ("cluster", "settings", "message"),
    [
        ({"training": {"max_seq_token_per_tpu": 512}}, {}, "max_seq_token_per_tpu = 512: packing"),
        ({"rollout": {"temperature": 0.0}}, {}, "temperature = 0.0 and top_p = 1.0 sample greedily"),
        ({"rollout": {"top_p": None}}, {}, "top_p = None sample greedily"),
        ({"rollout": {"top_p": 0.9}}, {}, "top_p = 0.9 and top_k = None exclude"),
        ({"rollout": {"top_k": 40}}, {}, "top_k = 40 exclude"),
        ({"rollout": {"eos_tokens": [0, 3]}}, {}, r"eos_tokens = \[0, 3\]"),
        ({"reference": False}, {}, "beta = 0.1 needs the reference"),
        ({"reference": False}, {"beta": 0.0}, None),
        ({"rollout": {"top_k": 40}}, {"allow_truncated_support": True}, None),
        ({"rollout": {"eos_tokens": [0]}}, {}, None),
    ],
)
def test_refused_cluster_settings(cluster, settings, message):
    if message is None:
        check_cluster(fake_cluster(**cluster), GVPOConfig(**settings))
        return
    with pytest.raises(SettingsError, match=message):
        check_cluster(fake_cluster(**cluster), GVPOConfig(**settings))


def test_grpo_settings_and_other_engines(caplog):
    from tunix.rl.grpo.grpo_learner import GRPOConfig

    with pytest.raises(SettingsError, match="algo_config is a GRPOConfig; GVPOLearner takes a GVPOConfig"):
        check_cluster(fake_cluster(), GRPOConfig())
    check_cluster(fake_cluster(engine="vllm"), GVPOConfig())
    assert "tested with rollout_engine 'vanilla' only" in caplog.text


def test_the_learner_asks_for_the_folder(learner):
    assert dataclasses.is_dataclass(learner.algo_config)
    with pytest.raises(TypeError, match="model_path"):
        GVPOLearner(learner.rl_cluster, learner.algo_config, runs.vowels)


@pytest.mark.parametrize("found", ["0.1.6", "0.1.8"])
def test_other_versions_are_refused(found):
    with pytest.raises(ImportError, match=f"google-tunix {found} is installed; gvpo_tunix was tried with >=0.1.7,<0.1"):
        gvpo_tunix.HOST.check(found)


def test_a_function_that_scored_nothing_of_a_group_is_not_part_of_its_reward():
    """Several tasks in one run, each with its function, which gives None on the others' prompts."""
    nan = float("nan")
    add = lambda prompts, completions, **_: [1.0, 0.0, None, None, 2.0, None]
    spell = lambda prompts, completions, **_: [None, None, 0.5, 0.25, 1.0, 1.0]
    manager = GVPORewardManager([add, spell], GVPOConfig(num_generations=2))
    found = manager(prompts=["1+1"] * 2 + ["cat"] * 2 + ["both"] * 2, completions=["b"] * 6)["rewards"]
    np.testing.assert_array_equal(found, [1.0, 0.0, 0.5, 0.25, 3.0, nan])
    none = lambda prompts, completions, **_: [None] * 6
    found = GVPORewardManager([none], GVPOConfig(num_generations=2))(prompts=["a"] * 6, completions=["b"] * 6)
    assert np.isnan(found["rewards"]).all()
