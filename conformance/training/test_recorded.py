"""Training on recorded groups, on the table policy: no sampling, exact steps, any number of responses a prompt."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from ranks import run_ranks
from recorded_data import config_of, groups, policy_of, records, run
from table_problem import BETA, PROMPTS, REFERENCE, RESPONSES, REWARDS, reward, table

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.data import DataError
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.watch.metric_names import undocumented

pytestmark = pytest.mark.core


def step_by_hand(logits: np.ndarray, rows: list[dict], rate: float, beta: float = BETA) -> np.ndarray:
    """One step of plain gradient descent along Eq. 16's loss / (2 beta), from the equations."""
    log_pi = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    counted = [r for r in rows if sum(x is not None for x in r["rewards"]) >= 2]
    gradient = np.zeros_like(logits)
    for row in counted:
        x = PROMPTS.index(row["prompt"])
        pairs = [
            (RESPONSES.index(y), r) for y, r in zip(row["responses"], row["rewards"], strict=True) if r is not None
        ]
        s = [log_pi[x, y] - math.log(REFERENCE[x, y]) for y, _ in pairs]
        k = len(pairs)
        mean_r, mean_s = sum(r for _, r in pairs) / k, sum(s) / k
        for (y, r), s_i in zip(pairs, s, strict=True):
            c = ((r - mean_r) - beta * (s_i - mean_s)) / ((k - 1) * len(counted))
            gradient[x] += c * np.exp(log_pi[x])
            gradient[x, y] -= c
    return logits - rate * gradient


def test_the_steps_equal_the_float64_reference(tmp_path):
    """Ragged groups, an unscored response, a group with one score left."""
    rows = groups()
    rows[1]["rewards"][2] = None
    single = {"prompt": "p0", "responses": ["a", "b"], "rewards": [1.0, None]}
    config = config_of(tmp_path, data={"shuffle": False}, run={"steps": 4})
    policy = run(config, [*rows[:2], single, *rows[2:]])
    assert policy.generated == 0
    want = np.log(REFERENCE)
    for first in (0, 3, 0, 3):  # the single group is skipped: six groups, three a step
        want = step_by_hand(want, rows[first : first + 3], config.optimizer.learning_rate)
    np.testing.assert_allclose(
        policy.logits - policy.logits.mean(1, keepdims=True), want - want.mean(1, keepdims=True), rtol=1e-12, atol=1e-12
    )
    told = records(tmp_path)[0]
    assert told["groups/skipped"] == 1 and told["groups/counted"] == 3 and told["responses/unscored"] == 1
    assert told["tokens/sampled"] == 0 and "kl" not in told and "entropy" not in told


def test_reaches_the_optimum_without_a_sample(tmp_path):
    """Thm 3.1 with Cor. 3.2 and 3.4: all responses recorded, in groups of different sizes."""
    rows = [
        {
            "prompt": p,
            "responses": list(RESPONSES) + list(RESPONSES[: i + 1]),
            "rewards": [*REWARDS[i], *REWARDS[i, : i + 1]],
        }
        for i, p in enumerate(PROMPTS)
    ]
    config = config_of(tmp_path, run={"steps": 250, "checkpoint_every": 0})
    policy = run(config, rows)
    optimum = REFERENCE * np.exp(REWARDS / BETA)
    optimum /= optimum.sum(axis=1, keepdims=True)
    pi = np.exp(policy.log_table())
    assert (pi * np.log(pi / optimum)).sum(axis=1).max() < 1e-10


def test_pairs_and_groups_of_two_take_the_same_steps(tmp_path):
    pairs = [{"prompt": p, "chosen": "c", "rejected": "d"} for p in PROMPTS]
    same = [{"prompt": p, "responses": ["c", "d"], "rewards": [1, 0]} for p in PROMPTS]
    for name in ("gvpo", "dpo"):
        changes = {"objective": {"name": name}}
        a = run(config_of(tmp_path / f"{name}a", **changes), pairs)
        b = run(config_of(tmp_path / f"{name}b", **changes), same)
        np.testing.assert_array_equal(a.logits, b.logits)


def test_dpo_takes_the_step_of_eq_8(tmp_path):
    pairs = [{"prompt": p, "chosen": "c", "rejected": "d"} for p in PROMPTS]
    config = config_of(tmp_path, objective={"name": "dpo"}, run={"steps": 1})
    policy = run(config, pairs)
    want = np.log(REFERENCE)
    gradient = np.zeros_like(want)
    for x in range(3):  # at pi = pi_ref: -beta sigmoid(0) (e_c - e_d) / 3, and the step's scale is 1/beta of it
        gradient[x, 2], gradient[x, 3] = -BETA * 0.5 / 3, BETA * 0.5 / 3
    want -= config.optimizer.learning_rate * gradient
    np.testing.assert_allclose(
        np.exp(policy.log_table()), np.exp(want) / np.exp(want).sum(1, keepdims=True), rtol=1e-12
    )


def test_sft_imitates_demonstrations(tmp_path):
    rows = [{"prompt": p, "completion": "c"} for p in PROMPTS]
    config = config_of(tmp_path, objective={"name": "sft"}, run={"steps": 40})
    policy = run(config, rows)
    assert (np.exp(policy.log_table())[:, 2] > 0.95).all()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_run_fed_from_its_own_completions_takes_the_same_steps(shuffle, tmp_path):
    """Bit for bit, over two passes of an epoch each, with unscored responses and a whole group without a score."""

    def gappy(prompts, completions, **columns):
        scores = reward(prompts, completions)
        return [None if (i * 7) % 5 == 0 or (i // 16 == 1 and i % 16) else s for i, s in enumerate(scores)]

    config = config_of(
        tmp_path / "a", data={"shuffle": shuffle}, objective={"epochs": 2, "minibatches": 3}, run={"steps": 7}
    )
    config = replace(config, rewards={"value": RewardConfig(function="given")})
    first = policy_of(config)
    train(config, first, train_rows=[{"prompt": p} for p in PROMPTS], rewards={"value": gappy})
    assert first.generated and any(r["groups/dropped_unscored"] for r in records(tmp_path / "a"))
    fed = replace(config, run=replace(config.run, folder=str(tmp_path / "b")), rewards={})
    fed = replace(fed, data=replace(fed.data, train=str(tmp_path / "a" / "completions.jsonl")))
    second = policy_of(fed)
    train(fed, second)
    assert second.generated == 0
    np.testing.assert_array_equal(second.logits, first.logits)
    for a, b in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
        for key in ("loss", "reward/mean", "reward/value", "gradient_norm", "regret/series", "length/mean"):
            assert a[key] == b[key], key
        assert a["kl"] == b["log_ratio"]


def test_ranks_change_nothing(tmp_path):
    rows = groups()
    config = config_of(tmp_path / "one")
    want = run(config, rows)
    for size in (2, 3):
        several = replace(config, run=replace(config.run, folder=str(tmp_path / f"of{size}")))
        ranks = run_ranks(size, lambda p, c=several: train(c, p, train_rows=rows), table(REFERENCE), config.optimizer)
        for policy in ranks:
            np.testing.assert_allclose(policy.logits, want.logits, rtol=1e-12, atol=1e-12)


def test_every_group_comes_once_a_pass(tmp_path):
    rows = [{"prompt": "p0", "responses": ["a", "b"], "rewards": [i, 0]} for i in range(1, 9)]
    config = config_of(tmp_path, rollout={"prompts": 2}, run={"steps": 8})
    run(config, rows)
    seen = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    best = [r["reward"] for r in seen if r["reward"]]
    assert sorted(best[:8]) == sorted(best[8:]) == list(range(1, 9))
    assert best[:8] != best[8:] and best[:8] != sorted(best[:8])


def test_the_header_says_what_is_read(tmp_path, capsys):
    rows = [*groups(), {"prompt": "p0", "responses": ["a"], "rewards": [1]}]
    run(config_of(tmp_path), rows)
    said = " ".join(capsys.readouterr().out.split())
    assert "groups: responses, rewards; rewards: rewards, 6 groups of 2 to 5 responses, 1 groups skipped" in said
    assert "3 recorded groups, nothing is sampled" in said


@pytest.mark.parametrize("name", ["a_star_po", "grpo", "dr_grpo", "rloo", "gspo", "maxrl"])
def test_objectives_with_a_ratio_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"objective\.name = '{name}' compares a response's probability now"):
        run(config_of(tmp_path, objective={"name": name}), groups())


def test_sft_on_rejected_responses_is_refused(tmp_path):
    pairs = [{"prompt": p, "chosen": "c", "rejected": "d"} for p in PROMPTS]
    with pytest.raises(ConfigError, match="imitates every scored response, also the rejected ones"):
        run(config_of(tmp_path, objective={"name": "sft"}), pairs)


def test_a_sampler_with_recorded_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a sampler is given, and the training data holds recorded responses"):
        run(config_of(tmp_path), groups(), sampler=TablePolicy(table(REFERENCE)))


def test_sampled_and_recorded_can_be_asked_for(tmp_path):
    rows = groups()
    config = config_of(tmp_path / "a", rollout={"source": "sampled"})
    with pytest.raises(ConfigError, match="no reward"):
        run(config, rows)
    config = replace(config, rewards={"value": RewardConfig(function="given")})
    assert run(config, rows, rewards={"value": reward}).generated
    config = config_of(tmp_path / "b", rollout={"source": "recorded"})
    with pytest.raises(DataError, match=r"train_rows has no recorded responses, .* its columns are prompt; expected"):
        run(config, [{"prompt": "p0"}])
    pairs = [{"prompt": p, "chosen": "c", "rejected": "d"} for p in PROMPTS]
    auto = replace(config_of(tmp_path / "c"), rewards={"value": RewardConfig(function="given")})
    with pytest.raises(ConfigError, match=r"and rewards are configured: set rollout\.source = 'recorded'"):
        run(auto, pairs, rewards={"value": reward})


def test_evaluation_by_loss_and_by_sampling(tmp_path):
    held_out = groups((3, 4, 2), seed=9)
    config = config_of(tmp_path / "loss", evaluation={"every": 2, "temperature": 1.0})
    policy = run(config, groups(), evaluation_rows=held_out)
    told = records(tmp_path / "loss", "eval")
    assert [r["step"] for r in told] == [0, 2, 4, 6] and policy.generated == 0
    assert "eval/reward" not in told[0] and told[0]["eval/groups"] == 3
    want = [np.var(r["rewards"], ddof=1) for r in held_out]
    assert told[0]["eval/loss"] == pytest.approx(np.mean(want), rel=1e-12), "s = 0 before the first step"
    assert (
        told[0]["eval/accuracy"] == 0.5
        and told[-1]["eval/accuracy"] > 0.5
        and told[-1]["eval/loss"] < told[0]["eval/loss"]
    )
    both = replace(config, run=replace(config.run, folder=str(tmp_path / "both")))
    both = replace(both, rewards={"value": RewardConfig(function="given")})
    policy = run(both, groups(), evaluation_rows=held_out, rewards={"value": reward})
    told = records(tmp_path / "both", "eval")
    assert policy.generated and {"eval/reward", "eval/loss"} <= told[0].keys()
    prompts_only = [{"prompt": p} for p in PROMPTS]
    run(
        replace(both, run=replace(both.run, folder=str(tmp_path / "p"))),
        groups(),
        evaluation_rows=prompts_only,
        rewards={"value": reward},
    )
    assert "eval/loss" not in records(tmp_path / "p", "eval")[0]
    with pytest.raises(ConfigError, match="holds prompts without scored responses, and there is no reward"):
        run(config_of(tmp_path / "q"), groups(), evaluation_rows=prompts_only)


def test_patience_follows_the_held_out_loss(tmp_path):
    config = config_of(
        tmp_path, evaluation={"every": 1, "patience": 2}, optimizer={"learning_rate": 0.0}, run={"steps": 9}
    )
    run(config, groups(), evaluation_rows=groups((3, 4), seed=5))
    assert len(records(tmp_path)) == 2
    assert "without a held-out loss below" in records(tmp_path, "event")[-1]["message"]


def test_the_dry_run_takes_two_groups_and_writes_nothing(tmp_path, capsys):
    from gvpo_core.training.cli.dry_run import preview

    config = config_of(tmp_path / "run")
    policy = policy_of(config)
    rollout = preview(config, policy, train_rows=groups())
    assert rollout.num_groups == 2 and policy.generated == 0 and not (tmp_path / "run").exists()
    assert "passes over 6 prompts" in " ".join(capsys.readouterr().out.split())


def test_token_ids_are_written_where_the_text_does_not_tokenize_back(tmp_path):
    class Merging(TablePolicy):
        """Draws "a" as two tokens of its own, which its tokenizer never gives."""

        def decode(self, tokens):
            return super().decode(tokens if tokens[0] != 2 else (1,))

    config = config_of(tmp_path, run={"steps": 1})
    config = replace(config, rewards={"value": RewardConfig(function="given")})
    policy = Merging(table(REFERENCE), config.optimizer)
    train(config, policy, train_rows=[{"prompt": p} for p in PROMPTS], rewards={"value": reward})
    rows = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert {tuple(row["response_ids"]) for row in rows if "response_ids" in row} == {(2, 0)}
    assert any(row["response"] == "a" and "response_ids" not in row for row in rows)
    fed = config_of(tmp_path / "fed", run={"steps": 1})
    again = Merging(table(REFERENCE), config.optimizer)
    train(fed, again, train_rows=rows)
    np.testing.assert_array_equal(again.logits, policy.logits)


def test_completions_of_an_older_version_are_refused(tmp_path):
    rows = [
        {"kind": "train", "step": 1, "group": 0, "prompt": "p0", "response": y, "reward": 1.0, "finished": True}
        for y in "ab"
    ]
    with pytest.raises(DataError, match="row 0 does not say whether its prompt was chat messages"):
        run(config_of(tmp_path), rows)


def test_every_key_of_a_recorded_run_is_documented(tmp_path):
    run(config_of(tmp_path), groups(), evaluation_rows=groups((2, 2)))
    for kind in ("train", "eval"):
        assert undocumented(records(tmp_path, kind)[0]) == []


def test_what_the_data_holds_is_not_an_alert(tmp_path):
    """Rewards that fall from row to row, groups whose rewards are equal, cut responses: the policy drew none of it."""
    rows = [
        {"prompt": "p0", "responses": ["a", "b"], "rewards": [40.0 - i, 40.0 - i], "finished": [False, False]}
        for i in range(40)
    ]
    rows[0]["rewards"] = [0.0, 90.0]
    run(config_of(tmp_path, data={"shuffle": False}, rollout={"prompts": 1}, run={"steps": 40}), rows)
    told = records(tmp_path)
    assert told[-1]["groups/all_equal"] == 1 and told[-1]["truncated"] == 1 and "reward/trend" not in told[-1]
    assert {alert["key"] for r in told for alert in r["alerts"]} <= {"gradient"}


def test_lengths_beyond_the_limits_are_refused_or_counted(tmp_path, capsys):
    rows = [
        *groups(),
        {"prompt": "p0", "responses": ["a", "b", "c"], "rewards": [1, 0, 0.5], "finished": [False, True, False]},
    ]
    config = config_of(tmp_path / "a", rollout={"max_tokens": 1}, run={"steps": 2})
    with pytest.raises(DataError, match=r"train_rows row 0, response 0 has 2 tokens, more than rollout.max_tokens = 1"):
        run(config, rows)
    dropping = replace(config, data=replace(config.data, too_long="drop"))
    run(dropping, rows)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "1 groups of 2 responses" in said and "6 groups skipped" in said and "20 responses dropped as too long" in said
    )
    kept = [json.loads(line) for line in (tmp_path / "a" / "completions.jsonl").read_text().splitlines()]
    assert {(r["response"], r["finished"]) for r in kept} == {("a", False), ("c", False)}

    class Short(TablePolicy):
        def describe(self):
            return replace(super().describe(), context=2)

    short = config_of(tmp_path / "b")
    with pytest.raises(DataError, match="more than the 1 that the prompt leaves of the model's 2 positions"):
        run(short, rows, Short(table(REFERENCE), short.optimizer))


def test_a_token_id_that_the_model_lacks_is_named(tmp_path):
    rows = [{"prompt": "p0", "responses": [[1, 0], [77, 0]], "rewards": [1, 0]}]

    class Small(TablePolicy):
        def describe(self):
            return replace(super().describe(), vocabulary=6)

    config = config_of(tmp_path)
    with pytest.raises(DataError, match=r"row 0, response 1 holds 77, which is not a token id of the model"):
        run(config, rows, Small(table(REFERENCE), config.optimizer))
    with pytest.raises(DataError, match="row 0, response 1 cannot be used: the table has no response 'zzz'"):
        run(config, [{"prompt": "p0", "responses": ["a", "zzz"], "rewards": [1, 0]}])


def test_data_without_a_pair_of_scores_is_refused(tmp_path):
    rows = [{"prompt": "p0", "responses": ["a", "b"], "rewards": [1, None]}]
    with pytest.raises(DataError, match=r"none of its 1 groups has 2 scored responses, which objective\.name = 'gvpo'"):
        run(config_of(tmp_path), rows)
    run(config_of(tmp_path, objective={"name": "reject_sampling"}, run={"steps": 1}), rows)
