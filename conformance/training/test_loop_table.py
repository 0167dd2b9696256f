"""The real training loop on the NumPy table policy, where pi, pi* and KL are known exactly."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import RankedTable, run_ranks
from table_problem import BETA, PROMPTS, REFERENCE, REWARDS, reward, settings, table

from gvpo_core.objectives import OBJECTIVES
from gvpo_core.training.cli.dry_run import preview
from gvpo_core.training.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
)
from gvpo_core.training.data import DataError, Prompts
from gvpo_core.training.loop import train
from gvpo_core.training.policy.step import factors_of
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.rewards import RewardError
from gvpo_core.training.rollout import collect
from gvpo_core.training.watch.metric_names import undocumented

pytestmark = pytest.mark.core

OTHER = np.array([[0.1, 0.1, 0.2, 0.3, 0.3], [0.4, 0.1, 0.1, 0.2, 0.2], [0.3, 0.2, 0.2, 0.1, 0.2]])


def optimum() -> np.ndarray:
    """pi* of Eq. 6, written from the equation."""
    unnormalised = REFERENCE * np.exp(REWARDS / BETA)
    return unnormalised / unnormalised.sum(axis=1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * (np.log(p) - np.log(q))).sum(axis=1)


def run(config: Config, policy: TablePolicy, sampler: TablePolicy | None = None):
    rows = [{"prompt": p} for p in PROMPTS]
    return train(config, policy, train_rows=rows, rewards={"value": reward}, sampler=sampler)


def records(folder: Path, kind: str = "train") -> list[dict]:
    return [
        r for line in (folder / "metrics.jsonl").read_text().splitlines() if (r := json.loads(line))["kind"] == kind
    ]


@pytest.mark.slow_on("third", "reference", "hot")
@pytest.mark.parametrize("samples", ["on-policy", "reference", "third", "hot"])
def test_reaches_the_optimum_from_any_samples(samples, tmp_path, capsys):
    """Thm 3.1 and Cor. 3.2: KL(pi_theta || pi*) < 1e-10, whoever draws the responses."""
    policy = TablePolicy(table(REFERENCE), settings(tmp_path).optimizer)
    sampler = {"reference": TablePolicy(table(REFERENCE)), "third": TablePolicy(table(OTHER))}.get(samples)
    config = settings(tmp_path)
    if samples == "hot":
        config = replace(config, rollout=replace(config.rollout, temperature=2.0))
    before = kl(np.exp(policy.log_table()), optimum()).max()
    run(config, policy, sampler)
    after = kl(np.exp(policy.log_table()), optimum()).max()
    assert before > 1e-2
    assert after < 1e-10


def test_a_sampler_with_tokens_that_the_policy_lacks_is_refused(tmp_path):
    class Small(TablePolicy):
        def describe(self):
            return replace(super().describe(), vocabulary=1)

    policy, sampler = Small(table(REFERENCE), settings(tmp_path).optimizer), TablePolicy(table(OTHER))
    with pytest.raises(ConfigError, match=r"the sampler drew the token id \d+, and the policy's vocabulary ends at 0"):
        collect(
            policy,
            Prompts(list(PROMPTS), [policy.encode(p) for p in PROMPTS], [{} for _ in PROMPTS], 0),
            [0, 1],
            16,
            settings(tmp_path).rollout.sampling,
            [],
            (0,),
            sampler=sampler,
        )


@pytest.mark.slow
def test_regret_in_the_metrics_is_beta_kl(tmp_path, capsys):
    """On-policy, both regrets of the step estimate beta KL(pi_theta || pi*), here averaged over 4,096 responses."""
    config = settings(tmp_path, rollout=RolloutConfig(prompts=3, responses=4096, max_tokens=2))
    config = replace(config, run=replace(config.run, steps=3), optimizer=OptimizerConfig(learning_rate=1.0))
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    exact = [BETA * kl(np.exp(policy.log_table()), optimum()).mean()]
    for step in range(1, 4):
        run(replace(config, run=replace(config.run, steps=step)), policy)
        exact.append(BETA * kl(np.exp(policy.log_table()), optimum()).mean())
    for record, value in zip(records(tmp_path), exact[:3], strict=True):
        assert record["regret/series"] == pytest.approx(value, rel=0.06)
        assert record["regret/second_order"] == pytest.approx(value, rel=0.25)  # third order of a regret of 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs_and_only_sft_leaves_the_reward(objective, tmp_path, capsys):
    config = settings(tmp_path, objective=ObjectiveConfig(name=objective, beta=0.05, epochs=2, minibatches=3))
    config = replace(config, run=replace(config.run, steps=30), optimizer=OptimizerConfig(learning_rate=0.3))
    policy = TablePolicy(table(REFERENCE), config.optimizer, updates=config.updates)
    before = (np.exp(policy.log_table()) * REWARDS).sum(axis=1).mean()
    run(config, policy)
    gain = (np.exp(policy.log_table()) * REWARDS).sum(axis=1).mean() - before
    assert policy.update_count == 30 * 2 * 3
    assert abs(gain) < 0.05 if objective == "sft" else gain > 0.03


def test_reference_rollout_leaves_the_first_reference_behind(tmp_path, capsys):
    """With pi_ref refreshed at each rollout the optimum moves on, past pi* of the initial reference."""
    config = settings(tmp_path, objective=ObjectiveConfig(beta=BETA, reference="rollout", epochs=4))
    config = replace(config, run=replace(config.run, steps=60))
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    run(config, policy)
    value = (np.exp(policy.log_table()) * REWARDS).sum(axis=1)
    assert (value > (optimum() * REWARDS).sum(axis=1) + 0.02).all()


@pytest.mark.parametrize(("world_size", "by_group"), [(2, False), (3, False), (5, False), (3, True)])
@pytest.mark.parametrize("objective", ["gvpo", "grpo"])
def test_ranks_take_the_step_of_one_process(world_size, by_group, objective, tmp_path, capsys, monkeypatch):
    """3 x 16 responses over 5 ranks: groups straddle ranks, and the parameters follow the one-process run.

    Over 3 ranks each has whole groups; with `by_group` it asks for their coefficients without the others.
    """
    monkeypatch.setattr(RankedTable, "by_group", by_group, raising=False)
    config = settings(tmp_path / "one", objective=ObjectiveConfig(name=objective, beta=BETA, epochs=2, minibatches=2))
    config = replace(
        config, run=replace(config.run, steps=4, checkpoint_every=2), optimizer=OptimizerConfig(learning_rate=1.0)
    )
    alone = TablePolicy(table(REFERENCE), config.optimizer)
    run(config, alone)
    config = replace(config, run=replace(config.run, folder=str(tmp_path / "many")))
    policies = run_ranks(world_size, lambda p: run(config, p), table(REFERENCE), config.optimizer)
    for policy in policies:
        np.testing.assert_allclose(policy.logits, alone.logits, rtol=1e-12, atol=1e-13)
    for one, many in zip(records(tmp_path / "one"), records(tmp_path / "many"), strict=True):
        for key in ("reward/mean", "loss", "kl", "regret/series", "length/mean", "groups/counted", "responses/total"):
            assert many[key] == pytest.approx(one[key], rel=1e-9, abs=1e-12), key
    completions = [json.loads(x) for x in (tmp_path / "many" / "completions.jsonl").read_text().splitlines()]
    assert len(completions) == 4 * 48


def test_what_one_rank_must_refuse_all_refuse(tmp_path, capsys):
    """A rank that stopped alone would leave the others waiting for its numbers."""
    config = settings(tmp_path)
    refused = []

    def work(policy):
        plain = policy.logprobs
        policy.logprobs = lambda batch, **options: plain(batch, **options) * (np.nan if policy.rank else 1.0)
        try:
            run(config, policy)
        except FloatingPointError as error:
            refused.append(str(error))

    run_ranks(2, work, table(REFERENCE), config.optimizer)
    assert len(refused) == 2 and refused[0] == refused[1]
    assert re.search(r"log-probabilities of \d+ of \d+ responses are not finite", refused[0])


def test_evaluation_at_both_ends_and_between(tmp_path, capsys):
    config = settings(tmp_path, evaluation=EvaluationConfig(every=2, responses=2, temperature=1.0))
    config = replace(config, run=replace(config.run, steps=5))
    rows = [{"prompt": p} for p in PROMPTS]
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    train(config, policy, train_rows=rows, evaluation_rows=rows, rewards={"value": reward})
    assert [r["step"] for r in records(tmp_path, "eval")] == [0, 2, 4, 5]


def test_rows_given_in_python_are_taken_as_they_are(tmp_path, capsys):
    """An empty list is not "none given": the configured file is not trained on in its place."""
    (tmp_path / "file.jsonl").write_text('{"prompt": "p0"}\n')
    config = settings(tmp_path / "run", data=DataConfig(train=str(tmp_path / "file.jsonl")))
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    for run_or_preview in (train, preview):
        with pytest.raises(DataError, match=r"train_rows = '\[\]' has no rows; expected at least one prompt"):
            run_or_preview(config, policy, train_rows=[], rewards={"value": reward})
        with pytest.raises(DataError, match=r"evaluation_rows = '\[\]' has no rows"):
            run_or_preview(config, policy, evaluation_rows=[], rewards={"value": reward})


def test_a_refused_start_leaves_the_folder_free(tmp_path, capsys):
    """As in a notebook: the wrong cell, then the right one."""
    config = settings(tmp_path)
    config = replace(config, run=replace(config.run, steps=2))
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    run(config, policy)
    with pytest.raises(ConfigError, match=r"objective.beta: 0.5 -> 0.25") as refused:
        run(replace(config, objective=ObjectiveConfig(beta=0.25)), policy)
    assert refused.value.__traceback__ is not None  # held, as a notebook holds it: its frames keep the folder alive
    assert run(replace(config, run=replace(config.run, steps=3)), policy).step == 3


@pytest.mark.parametrize("step", [0, 3], ids=["first evaluation", "step"])
def test_the_error_that_ends_a_run_is_in_records_and_report(step, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", "canary-Hq83nXw0")
    config = settings(tmp_path)
    config = replace(config, run=replace(config.run, steps=6, checkpoint_every=2), evaluation=EvaluationConfig(every=6))
    calls = []

    def failing(prompts, completions, **_):
        calls.append(1)
        if len(calls) > step:
            raise ConnectionError("refused\nwith canary-Hq83nXw0")
        return [float(len(c)) for c in completions]

    rows = [{"prompt": p} for p in PROMPTS]
    evaluated = {"evaluation_rows": rows} if step == 0 else {}
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    with pytest.raises(RewardError, match="reward value gave no score"):
        train(config, policy, train_rows=rows, rewards={"value": failing}, **evaluated)
    *_, event = records(tmp_path, "event")
    at = step + 1 if step else 0
    assert (event["event"], event["step"], event["verdict"]) == ("failed", at, "BAD")
    (alert,) = event["alerts"]
    assert alert["key"] == "error"
    assert alert["seen"].startswith(f"step {at} failed: reward value gave no score to any of")
    assert "ConnectionError: refused" in alert["seen"]
    report = (tmp_path / "report.html").read_text()
    assert f"It failed at step {at} of 6" in report
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"canary-Hq83nXw0" not in file.read_bytes(), file
    run(config, TablePolicy(table(REFERENCE), config.optimizer))  # mended: the alert goes with the step
    assert "failed" not in {e["event"] for e in records(tmp_path, "event")}


class Spoilt(TablePolicy):
    """Its parameters turn to NaN after two updates, as those of a run that went too far."""

    def update(self, batch, coefficients, *, scored=None):
        if self.update_count == 2:
            self.logits = np.full_like(self.logits, np.nan)
            factors_of(coefficients, self.logprobs(batch), np.arange(len(batch)))  # what every backend does first
        return super().update(batch, coefficients, scored=scored)


def test_a_step_of_nan_leaves_its_alert_in_metrics_console_and_report(tmp_path, capsys):
    config = settings(tmp_path)
    config = replace(
        config, run=replace(config.run, steps=6, checkpoint_every=2), optimizer=OptimizerConfig(learning_rate=0.1)
    )
    with pytest.raises(FloatingPointError, match="log-probabilities of 48 of 48 responses are not finite"):
        run(config, Spoilt(table(REFERENCE), config.optimizer))
    *_, event = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (event["kind"], event["event"], event["step"], event["verdict"]) == ("event", "failed", 3, "BAD")
    assert undocumented(event) == []
    (alert,) = event["alerts"]
    assert alert["key"] == "not_finite" and "step 3 failed: log-probabilities of 48 of 48" in alert["seen"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"BAD: {alert['seen']}; {alert['advice']}" in printed
    report = (tmp_path / "report.html").read_text()
    assert '<b class="level BAD">BAD</b> 1 alert in 2 steps, 1 of them at the last step' in report
    assert alert["seen"] in report and alert["advice"] in report
    assert "It failed at step 3 of 6" in report
    run(config, TablePolicy(table(REFERENCE), config.optimizer))  # mended: the alert goes with the step
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "failed" not in {e["event"] for e in records(tmp_path, "event")}
    assert "It finished at step 6." in (tmp_path / "report.html").read_text()
