"""GVPO by verl's settings alone, on verl's own functions; the settings that gvpo_verl refuses; whole groups."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from required import require

with warnings.catch_warnings(action="ignore"):
    require("verl", "transformers", subject="verl")
pytestmark = pytest.mark.filterwarnings("default")  # verl warns of engines that are not installed

with warnings.catch_warnings(action="ignore"):  # of Ray's, at import
    import torch
    import verl
    from gvpo_verl import HOST
    from gvpo_verl.scoring import check_lengths, check_same, warn_if_rounded
    from gvpo_verl.settings import RULES, check_settings
    from gvpo_verl.trainer import GVPOTrainer, group_order
    from hydra import compose, initialize_config_dir
    from transfer_queue import KVBatchMeta
    from transformers import LlamaConfig
    from verl.trainer.ppo import core_algos
    from verl.trainer.ppo.ray_trainer import apply_kl_penalty
    from verl.trainer.ppo.v1 import PPOTrainerSync
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

from gvpo_core import gvpo_coefficients

LONG = {
    "rope_type": "longrope",
    "rope_theta": 700.0,
    "factor": 2.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 16,
}
SETTINGS = [  # those of docs/verl.md
    "algorithm.adv_estimator=rloo",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_penalty=kl",
    "algorithm.kl_ctrl.type=fixed",
    "algorithm.kl_ctrl.kl_coef=0.1",
    "actor_rollout_ref.actor.policy_loss.loss_mode=gpg",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",
    "actor_rollout_ref.actor.use_kl_loss=False",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "actor_rollout_ref.rollout.temperature=1.0",
    "actor_rollout_ref.rollout.top_p=1.0",
    "actor_rollout_ref.rollout.n=8",
]


def config(*overrides: str) -> Any:
    """verl's whole configuration, as its main_ppo composes it."""
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", [*SETTINGS, *overrides])


@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 5, 3)], ids=["equal", "unequal"])
def test_gradient_by_settings_alone(sizes: tuple[int, ...]) -> None:
    """verl's functions at theta = theta_old, and gvpo_coefficients: the constant is 1 where groups are equal.

    RLOO's advantage is k / (k - 1) w_i and the loss a mean over N rows; GVPO's coefficient is w_i / ((k - 1) G). So
    verl weighs a group by k / N where GVPO has 1 / G.
    """
    draw, beta = torch.Generator().manual_seed(3), 0.3
    uids = np.repeat(np.arange(len(sizes)), sizes)[torch.randperm(sum(sizes), generator=draw).numpy()]
    n, tokens = len(uids), 6
    mask = (torch.arange(tokens) < torch.randint(1, tokens + 1, (n, 1), generator=draw)).double()
    logprobs, ref = (-torch.rand(n, tokens, generator=draw, dtype=torch.float64) for _ in range(2))
    scores = torch.zeros(n, tokens, dtype=torch.float64)
    scores[torch.arange(n), mask.sum(1).long() - 1] = torch.randn(n, generator=draw, dtype=torch.float64)
    data: Any = SimpleNamespace(batch=Batch(n))
    data.batch |= {
        "response_mask": mask,
        "token_level_scores": scores,
        "old_log_probs": logprobs,
        "ref_log_prob": ref,
    }
    controller = core_algos.get_kl_controller(SimpleNamespace(type="fixed", kl_coef=beta))
    data, _ = apply_kl_penalty(data, controller, kl_penalty="kl")
    advantages, _ = core_algos.compute_rloo_outcome_advantage(data.batch["token_level_rewards"], mask, uids)
    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="gpg"),
        loss_agg_mode="seq-mean-token-sum",
    )
    policy = logprobs.clone().requires_grad_()
    loss, _ = core_algos.get_policy_loss_fn("gpg")(
        logprobs, policy, advantages, mask, loss_agg_mode=actor.loss_agg_mode, config=actor
    )
    loss.backward()
    own = ((x * mask).sum(1).numpy() for x in (logprobs, ref, scores))
    wanted = -gvpo_coefficients(*own, uids, beta=beta)[:, None] * mask.numpy()
    weight = np.asarray(sizes)[uids] * len(sizes) / n  # 1 where groups are equal
    np.testing.assert_allclose(policy.grad.numpy(), weight[:, None] * wanted, rtol=1e-9, atol=1e-12)


class Batch(dict):
    """What apply_kl_penalty reads of a DataProto's batch."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.batch_size = (n,)


def test_the_documented_settings_are_accepted() -> None:
    assert check_settings(config()) == 0.1
    assert check_settings(config("algorithm.kl_ctrl.kl_coef=0", "algorithm.use_kl_in_reward=False")) == 0.0


REFUSED = {
    "trainer.use_v1": "False",
    "algorithm.adv_estimator": "grpo",
    "algorithm.kl_ctrl.type": "adaptive",
    "algorithm.kl_ctrl.kl_coef": "-0.1",
    "algorithm.rollout_correction.rollout_is": "token",
    "algorithm.rollout_correction.rollout_rs": "token_k1",
    "algorithm.rollout_correction.bypass_mode": "True",
    "algorithm.filter_groups.enable": "True",
    "actor_rollout_ref.actor.strategy": "megatron",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.use_kl_loss": "True",
    "actor_rollout_ref.actor.entropy_coeff": "0.01",
    "actor_rollout_ref.actor.shuffle": "True",
    "actor_rollout_ref.actor.fsdp_config.qat.enable": "True",
    "actor_rollout_ref.model.lora.rank": "8",
    "distillation.enabled": "True",
    "actor_rollout_ref.rollout.n": "1",
    "actor_rollout_ref.rollout.temperature": "0.8",
    "actor_rollout_ref.rollout.do_sample": "False",
    "actor_rollout_ref.rollout.ignore_eos": "True",
    "actor_rollout_ref.rollout.top_p": "0.9",
    "actor_rollout_ref.rollout.top_k": "50",
}


@pytest.mark.parametrize("path", REFUSED)
def test_a_setting_is_refused_with_its_name(path: str) -> None:
    with pytest.raises(ValueError, match=rf"\n{path.replace('.', '[.]')} is .*; set it to ") as caught:
        GVPOTrainer(config(f"++{path}={REFUSED[path]}"))
    assert str(caught.value).count("\n") == 1, "one setting, one line"


def test_a_beta_that_is_not_finite_is_refused() -> None:
    settings = config("algorithm.use_kl_in_reward=False")
    for given in (None, "0.1", float("inf"), float("nan"), -0.1):
        settings.algorithm.kl_ctrl.kl_coef = given
        with pytest.raises(
            ValueError, match=rf"kl_coef is {given!r}; set it to a finite number of at least 0"
        ) as caught:
            check_settings(settings)
        assert str(caught.value).count("\n") == 1, "one setting, one line"


def test_every_rule_has_a_refused_value() -> None:
    assert {rule.name for rule in RULES} == REFUSED.keys()


def test_a_reference_that_is_not_there_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.use_kl_in_reward is False and .* is 0\.1; set the first"):
        check_settings(config("algorithm.use_kl_in_reward=False"))


def test_an_adapter_that_verl_would_not_load_is_refused() -> None:
    adapter = "actor_rollout_ref.model.lora_adapter_path=here"
    with pytest.raises(ValueError, match=r"lora_adapter_path is 'here' and .*lora_rank is 0; set the second"):
        check_settings(config(adapter))
    assert check_settings(config(adapter, "actor_rollout_ref.model.lora_rank=8")) == 0.1


@pytest.mark.parametrize("found", ["0.8.2", "0.10.0", "1.0"])
def test_another_version_of_the_host_is_refused(found: str) -> None:
    with pytest.raises(ImportError, match=rf"verl {found} is installed; gvpo_verl was tried with >=0.9,<0.10"):
        HOST.check(found)


@pytest.mark.parametrize(("sizes", "mini", "ranks"), [([4] * 8, 8, 2), ([8] * 4, 16, 4), ([3, 5, 2, 6, 4, 4], 8, 2)])
def test_mini_batches_hold_whole_groups(sizes: list[int], mini: int, ranks: int) -> None:
    draw = np.random.default_rng(0)
    uids = [f"u{i}" for i in draw.permutation(np.repeat(np.arange(len(sizes)), sizes))]
    order = group_order(uids, draw.integers(1, 50, len(uids)).tolist(), mini, ranks)
    assert sorted(order) == list(range(len(uids)))
    parts = np.array_split([uids[i] for i in order], ranks)
    seen: list[set[str]] = []
    for start in range(0, len(parts[0]), mini // ranks):
        seen.append({uid for part in parts for uid in part[start : start + mini // ranks]})
    assert sum(map(len, seen)) == len(set(uids)), "a group lies in two mini-batches"


def test_a_group_that_fits_nowhere_is_cut_and_no_row_is_lost() -> None:
    uids = [*"aaaaabbbbbccc"[:12]]
    order = group_order(uids, [1] * 12, 4, 2)
    assert sorted(order) == list(range(12))


def test_the_trainer_reorders_the_balanced_batch() -> None:
    trainer = object.__new__(GVPOTrainer)
    trainer.config = config("actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4")
    trainer.use_critic, trainer.global_steps, trainer.tokenizer = False, 1, SimpleNamespace(eos_token_id=0)
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0, 1]})
    draw = np.random.default_rng(1)
    keys = [f"u{i % 6}_{i // 6}_0" for i in draw.permutation(24)]
    batch = KVBatchMeta(keys=keys, tags=[{"seq_len": int(draw.integers(2, 90))} for _ in keys], partition_id="train")
    batch = trainer._balance_batch(batch, {})
    assert sorted(batch.keys) == sorted(keys)
    for step in range(3):  # mini-batches of 2 prompts x 4 responses, half of them on each of 2 ranks
        rows = [key for rank in (0, 12) for key in batch.keys[rank + 4 * step : rank + 4 * step + 4]]
        assert len({key.split("_")[0] for key in rows}) == 2


@pytest.mark.parametrize("loaded", [True, False])
def test_workers_without_gvpo_stop_the_run(loaded: bool, monkeypatch) -> None:
    def update(self: Any, batch: Any, metrics: dict[str, float]) -> Any:
        ours = {"actor/gvpo/loss": 0.1, "actor/gvpo/groups/counted": 1.0}
        metrics.update(ours if loaded else {"actor/pg_loss": 0.1})
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_update_actor", update)
    trainer = object.__new__(GVPOTrainer)
    trainer.gvpo_beta = 0.1
    batch = SimpleNamespace(extra_info={})
    if loaded:
        assert trainer._update_actor(batch, {}).extra_info == {"gvpo_beta": 0.1}
        return
    with pytest.raises(RuntimeError, match=r"not imported in their processes; set VERL_USE_EXTERNAL_MODULES"):
        trainer._update_actor(batch, {})


def test_a_rollout_without_signal_stops_the_run(monkeypatch) -> None:
    def update(self: Any, batch: Any, metrics: dict[str, float]) -> Any:
        metrics.update({"actor/gvpo/loss": 0.0, "actor/gvpo/groups/counted": 0.0})
        return batch

    monkeypatch.setattr(PPOTrainerSync, "_update_actor", update)
    trainer = object.__new__(GVPOTrainer)
    trainer.gvpo_beta = 0.1
    with pytest.raises(RuntimeError, match="no group of this rollout has two responses with a score"):
        trainer._update_actor(SimpleNamespace(extra_info={}), {})


@pytest.mark.parametrize(
    ("rope", "lengths", "message"),
    [
        ({"rope_type": "default", "rope_theta": 700.0}, [4, 90], None),
        ({"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0}, [4, 32], None),
        ({"rope_type": "dynamic", "rope_theta": 700.0, "factor": 2.0}, [40, 50], "'dynamic' and a row has 50 tokens"),
        (LONG, [4, 16], None),
        (LONG, [17, 30], None),
        (LONG, [16, 30], "'longrope' and a row has 30 tokens: beyond 16 tokens"),
    ],
)
def test_rows_whose_rope_depends_on_others_are_refused(rope: Any, lengths: list[int], message: str | None) -> None:
    settings = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=32, rope_parameters=rope)
    if message is None:
        check_lengths(settings, torch.tensor(lengths))
        return
    with pytest.raises(ValueError, match=message):
        check_lengths(settings, torch.tensor(lengths))


def test_scores_that_differ_are_refused() -> None:
    a = torch.tensor([-1.0, -2.0])
    check_same("M", a, a + 1e-3, "here", rounded=False)
    check_same("M", a, a + torch.tensor([0.15, 0.0]), "here", rounded=True)
    with pytest.raises(ValueError, match=r"M scores tokens differently here, by up to 0\.003 nat each"):
        check_same("M", a, a + 3e-3, "here", rounded=False)
    with pytest.raises(ValueError, match="M scores tokens differently here"):
        check_same("M", a, torch.tensor([float("nan"), -2.0]), "here", rounded=True)


def test_logprobs_that_verl_rounded_to_bfloat16_are_warned_of(recwarn) -> None:
    """As verl's own function computes them from bfloat16 logits; from float32 ones nothing is said."""
    from verl.utils.torch_functional import logprobs_from_logits_v2

    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 9, 50, generator=draw), torch.randint(0, 50, (4, 9), generator=draw)
    wide = logprobs_from_logits_v2(logits, labels).flatten()
    assert not warn_if_rounded("old_log_probs", wide) and not recwarn.list
    narrow = logprobs_from_logits_v2(logits.bfloat16(), labels).flatten().float()
    assert float((narrow - wide).abs().max()) > 1e-3
    with pytest.warns(UserWarning, match="old_log_probs are rounded to bfloat16, each by up to 0.0"):
        assert warn_if_rounded("old_log_probs", narrow)
    assert not warn_if_rounded("old_log_probs", torch.zeros(20))  # padding
