"""The verdict of a step: an injected trouble is named within five steps, a healthy run is left in peace."""

import inspect
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import table_run
from measured_step import encode_record, make_record
from simulated_run import write_run
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.config.file import read_config
from gvpo_core.training.data import load_rows
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.run import journal
from gvpo_core.training.watch import checks
from gvpo_core.training.watch.alerts import ALERTS, BAD, OK, WATCH, Alerts
from gvpo_core.training.watch.console import Console

pytestmark = pytest.mark.core

ROWS = [{"prompt": p} for p in PROMPTS]
HEALTHY = 110  # steps of the simulated run in which it learns; after about 140 it has solved its prompts


def simulated(folder, *, seed=0, steps=HEALTHY, prompts=8):
    """Train records of the simulated run, as metrics.jsonl gives them back."""
    lines = write_run(folder, seed=seed, steps=steps, prompts=prompts)
    return [json.loads(encode_record(r)) for r in lines if r["kind"] == "train"]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return simulated(tmp_path_factory.mktemp("runs") / "healthy")


def raised(records, beta=0.05):
    """(step, alert) of every alert, in order; the simulated run has this beta."""
    alerts = Alerts(beta)
    return [(r["step"], a) for r in records for a in alerts.update(r).reasons]


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_raises_none(seed, tmp_path):
    assert raised(simulated(tmp_path / "run", seed=seed)) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_has_solved_its_prompts_gets_that_alert_alone(seed, tmp_path):
    found = {(a.key, a.level, a.advice) for _, a in raised(simulated(tmp_path / "run", seed=seed, steps=240))}
    assert found == {("dead_groups", WATCH, "these prompts are solved: use harder ones, or stop the run")}


def test_a_run_that_really_falls_apart_is_called_bad(tmp_path):
    records = simulated(tmp_path / "run", seed=1, steps=160, prompts=4)  # few prompts at a high rate: it diverges
    rewards = [r["reward/mean"] for r in records]
    assert np.mean(rewards[-5:]) < 0.3 * max(np.convolve(rewards, np.ones(20) / 20, "valid"))
    assert {(a.key, a.level) for _, a in raised(records)} >= {("reward", BAD), ("dead_groups", BAD)}


def noise(seed, *, groups=8, k=8, steps=300):
    """Records as noisy as a language model's: heavy tails, prompts of all difficulties, slow and healthy trends."""
    draw = np.random.default_rng(seed)
    for t in range(steps):
        p = 0.15 + 0.6 * (1 - np.exp(-t / 150))
        right = draw.binomial(k, draw.beta(1.2 * p, 1.2 * (1 - p), size=groups))
        best, worst = int((right == k).sum()), int((right == 0).sum())
        bell = draw.standard_normal(5)
        yield {
            "kind": "train", "step": t + 1, "reward/mean": right.mean() / k, "reward/min": 0.0, "reward/max": 1.0,
            "groups/counted": groups, "groups/all_equal": best + worst, "groups/all_best": best,
            "groups/all_worst": worst, "entropy": 0.9 * np.exp(-t / 200 + 0.15 * bell[0]) + 0.03,
            "kl": 4 * (1 - np.exp(-t / 80)) + 0.3 * bell[1] * (t > 0),
            "gradient_norm": np.exp(0.6 * bell[2]) * (1 - (best + worst) / groups + 0.02),
            "length/mean": 200 * (1 + t / 150) * np.exp(0.12 * bell[3]), "responses/total": groups * k,
            "truncated": draw.binomial(groups * k, 0.08) / groups / k, "memory/peak": 2**34 + draw.integers(2**30),
            "responses/unscored": int(draw.binomial(groups * k, 0.005)), "seconds/step": 14 * np.exp(0.2 * bell[4]),
            "tokens_per_second": 900 * np.exp(-0.2 * bell[4]),
        }  # fmt: skip


@pytest.mark.parametrize("groups", [8, 64])
def test_noise_is_not_an_alarm(groups):
    assert [found for seed in range(10) for found in raised(noise(seed, groups=groups))] == []


class Watched(TablePolicy):
    """A table policy that `spoil`s itself and its responses from an update on: counted in what checkpoints keep."""

    def __init__(self, config, spoil=None, at=math.inf):
        super().__init__(table(REFERENCE), config.optimizer, updates=config.updates)
        self.spoil, self.at = spoil, at

    def generate(self, prompts, seeds, sampling):
        drawn = super().generate(prompts, seeds, sampling)
        return self.spoil(self, drawn) if self.spoil and self.update_count >= self.at else drawn


def table_config(folder, *, seed=0, steps=60):
    config = settings(folder)
    run = replace(config.run, seed=seed, steps=steps)
    return replace(config, run=run, optimizer=replace(config.optimizer, learning_rate=4.0))


def run_table(config, policy, rewards=reward):
    """The run's train records, with the verdicts that the loop wrote."""
    console = Console(config.run.steps, stream=io.StringIO())
    folder = train(config, policy, train_rows=ROWS, rewards={"value": rewards}, console=console).folder
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "train"]


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_run_of_the_real_loop_raises_none(seed, tmp_path):
    config = table_config(tmp_path / "run", seed=seed)
    records = run_table(config, Watched(config))
    assert [r["alerts"] + r["machine/alerts"] for r in records] == [[]] * 60
    assert {r["verdict"] for r in records} == {OK} == {r["machine/verdict"] for r in records}


@pytest.mark.parametrize("seed", range(3))
def test_a_tiny_step_is_not_an_alarm(seed, tmp_path):
    config = read_config(table_run.make(tmp_path, steps=40))  # two prompts a step
    config = replace(config, run=replace(config.run, seed=seed, checkpoint_every=0, show_every=0))
    probabilities = json.loads((tmp_path / "table.json").read_text())
    rows = load_rows(str(tmp_path / "train.jsonl"), "data.train")
    policy = TablePolicy(probabilities, config.optimizer, updates=config.updates)
    folder = train(config, policy, train_rows=rows, evaluation_rows=rows, console=Console(40, stream=io.StringIO()))
    records = [json.loads(line) for line in (folder.folder / "metrics.jsonl").read_text().splitlines()]
    assert {r["verdict"] for r in records if r["kind"] == "train"} == {OK}


def sharpened(policy, drawn):
    policy.logits = np.where(np.isfinite(policy.logits), 30.0 * np.eye(3, 5), policy.logits)
    return drawn


def moved_away(policy, drawn):
    policy.logits = policy.logits + 12.0 * np.eye(3, 5)[:, ::-1]
    return drawn


def cut(policy, drawn):
    return [[replace(r, finished=False) for r in group] for group in drawn]


@pytest.mark.parametrize(
    ("spoil", "key"),
    [(cut, "truncation"), (moved_away, "kl"), (sharpened, "entropy")],
    ids=["truncation", "kl", "entropy"],
)
def test_a_fault_in_the_real_loop_raises_its_alert_in_five_steps(spoil, key, tmp_path):
    config = table_config(tmp_path / "run", steps=25)
    records = run_table(config, Watched(config, spoil, at=20))
    assert {a["key"] for r in records[:20] for a in r["alerts"]} == set()
    assert key in {a["key"] for r in records[20:] for a in r["alerts"]}


@pytest.mark.parametrize(("value", "advice"), [(0.0, "use easier prompts"), (9.0, "use harder ones")])
def test_dead_groups_in_the_real_loop(value, advice, tmp_path):
    config = table_config(tmp_path / "run", steps=25)
    policy = Watched(config)

    def scored(prompts, completions, **columns):
        if policy.update_count >= 20:
            return [value] * len(completions)
        own = reward(prompts, completions)
        return [9.0, 0.0, *own[2:]] if policy.update_count == 3 else own

    records = run_table(config, policy, scored)
    assert [r["verdict"] for r in records[:24]] == [OK] * 24
    (alert,) = (a for a in records[24]["alerts"] if a["key"] == "dead_groups")
    assert alert["seen"].startswith("dead groups 100% for 5 steps") and advice in alert["advice"]


@pytest.mark.slow
def test_an_interrupted_run_gives_the_verdicts_of_an_unbroken_one(tmp_path):
    config = table_config(tmp_path / "whole", steps=32)
    whole = run_table(config, Watched(config, moved_away, at=20))
    assert {r["verdict"] for r in whole} == {OK, WATCH, BAD}
    kept = [[r[k] for k in ("step", "verdict", "alerts", "reward/trend") if k in r] for r in whole]
    for stop in (19, 21, 23):
        # The schedule is constant, so that a run told to go further is the same run.
        config = table_config(tmp_path / f"broken-{stop}", steps=stop)
        run_table(config, Watched(config, moved_away, at=20))
        config = replace(config, run=replace(config.run, steps=32))
        broken = run_table(config, Watched(config, moved_away, at=20))
        assert [[r[k] for k in ("step", "verdict", "alerts", "reward/trend") if k in r] for r in broken] == kept


CHANGES = {  # what is wrong, as changes to a healthy record
    "dead_groups": {"groups/all_equal": 7, "groups/all_best": 0, "groups/all_worst": 7, "groups/counted": 8},
    "entropy": {"entropy": lambda v: 0.2 * v},
    "kl": {"kl": lambda v: 6 * v + 2},
    "gradient": {"gradient_norm": lambda v: 40 * v},
    "truncation": {"truncated": 0.8},
    "length": {"length/mean": lambda v: 3 * v},
    "turns": {"episodes/turns": 0.9, "episodes/repeated": 0.0},
    "environment": {"episodes/failed": 0.2},
    "reward_timeout/right": {"reward_errors/right/timeout": 12},
    "reward_error/right": {"reward_errors/right/error": 12},
    "unscored": {"responses/unscored": 12, "reward_errors/right/error": 0},
    "not_finite": {"loss": None},
}


@pytest.mark.parametrize("start", [12, 40, 90])
@pytest.mark.parametrize("key", CHANGES)
def test_each_trouble_is_named_within_five_steps(healthy, key, start):
    changed = [dict(r) for r in healthy]
    for record in changed[start:]:
        for name, change in CHANGES[key].items():
            record[name] = change(record[name]) if callable(change) else change
    found = raised(changed[: start + 5])
    assert [a.key for step, a in found if step <= start] == []
    assert key in {a.key for _, a in found}, found
    alert = next(a for _, a in found if a.key == key)
    assert any(c.isdigit() for c in alert.seen) and len(alert.advice) > 20 and alert.level in (WATCH, BAD)


def test_dead_groups_are_distinguished(healthy):
    base = {"groups/all_equal": 8, "groups/counted": 8, "groups/all_best": 0, "groups/all_worst": 0}

    def said(**more):
        changed = [r | base | {f"groups/{k}": v for k, v in more.items()} for r in healthy[40:45]]
        *_, alert = (a for _, a in raised(healthy[:40] + changed) if a.key == "dead_groups")
        return alert

    wrong, right, middle = said(all_worst=8), said(all_best=8), said()
    assert (wrong.level, right.level, middle.level) == (BAD, WATCH, BAD)
    assert "(0% all right, 100% all wrong)" in wrong.seen and "easier prompts" in wrong.advice
    assert "(100% all right, 0% all wrong)" in right.seen and "harder" in right.advice
    assert "finer reward" in middle.advice
    constant = [{**r, **base, "reward/mean": 0.0, "reward/min": 0.0, "reward/max": 0.0} for r in healthy[:5]]
    (alert,) = (a for _, a in raised(constant) if a.key == "dead_groups")
    assert alert.level == BAD and "all rewards so far are equal" in alert.advice


def test_one_spike_is_watched_and_forgotten_and_a_lasting_one_is_bad(healthy):
    once = [dict(r) for r in healthy[:60]]
    once[40]["kl"] = 50.0
    assert {(step, a.level) for step, a in raised(once) if a.key == "kl"} == {(s, WATCH) for s in range(41, 46)}
    lasting = [dict(r) for r in healthy[:60]]
    for record in lasting[40:]:
        record["kl"] += 50.0
    levels = [(step, a.level) for step, a in raised(lasting) if a.key == "kl"]
    assert levels[:3] == [(41, WATCH), (42, WATCH), (43, BAD)] and levels[-1][0] < 56  # then it is the usual


def test_reward_that_falls_is_named(healthy):
    changed = [dict(r) for r in healthy]
    for record in changed[90:]:
        record["reward/mean"] *= 0.3
    found = [(step, a) for step, a in raised(changed) if a.key == "reward"]
    assert found and found[0][0] <= 90 + 10


def test_kl_that_costs_more_than_it_brings_is_named_where_beta_is_known(healthy):
    flat = [r | {"reward/mean": 0.2 + 0.01 * (i % 3), "kl": 0.06 * i} for i, r in enumerate(healthy)]
    found = raised(flat)
    assert {(a.key, a.level) for _, a in found} == {("kl_cost", WATCH)} and 30 <= found[0][0] <= 50
    cost = 0.05 * 0.06 * (np.mean(range(len(flat) - 10, len(flat))) - 4.5)
    assert found[-1][1].seen.startswith(f"beta x KL grew by {cost:.3g} since the start, the reward by ")
    assert raised(flat, beta=None) == []  # another sampler: the record's kl is no KL
    assert raised(flat, beta=0.001) == []  # cheap


@pytest.mark.parametrize(
    ("changes", "known"),
    [({}, True), ({"temperature": 0.7}, False), ({"sampler": True}, False), ({"length_exponent": 0.5}, False)],
)
def test_the_run_prices_kl_only_where_its_own_policy_draws_at_temperature_1(changes, known, tmp_path, monkeypatch):
    prices = []
    monkeypatch.setattr(journal, "Alerts", lambda beta=None, ahead=0: prices.append(beta) or Alerts(beta))
    config = table_config(tmp_path / "run", steps=1)
    if "temperature" in changes:
        config = replace(config, rollout=replace(config.rollout, temperature=0.7))
    if "length_exponent" in changes:
        config = replace(config, objective=replace(config.objective, length_exponent=0.5))
    sampler = TablePolicy(table(REFERENCE)) if "sampler" in changes else None
    policy = TablePolicy(table(REFERENCE), config.optimizer, updates=config.updates)
    train(config, policy, train_rows=ROWS, rewards={"value": reward}, sampler=sampler)
    assert prices[-1] == (config.objective.beta if known else None)


def test_slow_troubles(healthy):
    grown = [dict(r) for r in healthy]
    for i, record in enumerate(grown):
        record["truncated"] = min(1.0, record["truncated"] + max(0, i - 30) / 100)  # a creep, never a jump
    assert "truncation" in {a.key for _, a in raised(grown)}
    longer = [r | {"reward/mean": 0.2 + 0.01 * (i % 3), "length/mean": 5 * 1.02**i} for i, r in enumerate(healthy)]
    assert {a.key for _, a in raised(longer, beta=None)} == {"length"}
    flat = [r | {"reward/mean": 0.2 + 0.01 * (i % 3), "entropy": 0.8 * 0.96**i} for i, r in enumerate(healthy)]
    assert {a.key for _, a in raised(flat, beta=None)} == {"entropy"}


def test_the_machine_is_judged_apart(healthy):
    slow = [dict(r) for r in healthy]
    for record in slow[60:]:
        record["tokens_per_second"] /= 4
        record["seconds/step"] *= 4
    found = raised(slow)
    assert {(a.key, a.level) for _, a in found} == {("throughput", WATCH)} and found[0][0] <= 65
    leaking = [r | {"memory/peak": 2**30 + i * 2**24} for i, r in enumerate(healthy)]
    alerts = Alerts()
    notes = [alerts.annotate(r) for r in leaking]
    assert {n["verdict"] for n in notes} == {OK} and {n["machine/verdict"] for n in notes} == {OK, WATCH}
    (alert,) = notes[-1]["machine/alerts"]
    assert alert["key"] == "memory" and "GiB" in alert["seen"]
    faster = [r | {"tokens_per_second": r["tokens_per_second"] / 4} for r in healthy]  # short answers, quick steps
    assert raised(faster) == []


def test_state_is_rebuilt_from_the_file(healthy):
    changed = [dict(r) for r in healthy[:60]]
    for i in (20, 21, 22, 23, 24, 40):
        changed[i] |= {"groups/all_equal": 8, "groups/all_worst": 8, "kl": 50.0, "loss": None}
    alerts = Alerts()
    whole = [alerts.annotate(r) for r in changed]
    assert any(n["alerts"] for n in whole)
    for k in range(len(changed)):
        resumed = Alerts.replay(json.loads(encode_record(r)) for r in [{"kind": "eval"}, *changed[:k]])
        assert resumed.annotate(changed[k]) == whole[k]


def test_every_alert_is_documented_and_every_documented_one_is_tried():
    tried = set(CHANGES) | {"reward", "kl_cost", "throughput", "memory", "no_update"}
    tried |= {"error", "sampler_gap", "staleness"}  # by test_loop_table.py, test_sampler_metrics.py
    patterns = {re.escape(k).replace("<kind>", "(error|timeout|none)").replace("<name>", ".+") for k in ALERTS}
    assert not [key for key in tried if not any(re.fullmatch(p, key) for p in patterns)]
    assert not [p for p in patterns if not any(re.fullmatch(p, key) for key in tried)]
    files = [Path(inspect.getfile(Alerts)), *Path(checks.__file__).parent.glob("*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    assert source.count("Alert(") >= 15
    assert set(re.findall(r'Alert\(\s*f?"([^"{/]+)', source)) <= {k.partition("_<")[0] for k in ALERTS} | {"reward_"}


def test_null_and_nan_are_the_same_and_records_may_lack_anything(healthy):
    live = [r | {"kl": math.nan if i == 30 else r["kl"]} for i, r in enumerate(healthy[:40])]
    written = [make_record("train", r["step"], r, now=0.0) for r in live]
    assert raised(live) == raised(written) and raised(live)[0][1].seen == "kl: no finite number at step 31"
    assert raised([{"kind": "train", "step": i} for i in range(1, 80)]) == []
    for key in sorted({k for r in healthy for k in r} - {"step"}):
        raised([{k: v for k, v in r.items() if k != key} for r in healthy[:40]])


def test_trend_is_the_change_against_the_steps_before(healthy):
    alerts = Alerts()
    notes = [alerts.annotate(r) for r in healthy[:15]]
    means = [r["reward/mean"] for r in healthy[:15]]
    assert "reward/trend" not in notes[0]
    assert notes[2]["reward/trend"] == pytest.approx(means[2] - np.mean(means[:2]))
    assert notes[14]["reward/trend"] == pytest.approx(means[14] - np.mean(means[4:14]))


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"gradient_norm": 0.0}, "gradient exactly 0, and rewards differ in 3 groups"),
        ({"gradient_norm": 1e-20}, "gradient of norm 1e-20, which changes no weight, and rewards differ in 3 groups"),
        ({"learning_rate": 0.0}, "learning rate 0: the step changed no parameter"),
        ({"gradient_norm": 0.0, "groups/all_equal": 4}, None),  # dead groups at their optimum have no gradient
    ],
)
def test_a_step_that_changes_nothing_is_bad_at_once(changes, seen):
    record = {"step": 1, "gradient_norm": 0.5, "learning_rate": 1e-6, "groups/counted": 4, "groups/all_equal": 1}
    assert Alerts().update(record).level == OK
    verdict = Alerts().update(record | changes)
    assert [(a.key, a.level, a.seen) for a in verdict.reasons] == ([("no_update", BAD, seen)] if seen else [])


def test_a_run_at_learning_rate_zero_is_called_bad(tmp_path):
    config = settings(tmp_path / "run")
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=0.0), run=replace(config.run, steps=1))
    train(config, TablePolicy(table(REFERENCE), config.optimizer), train_rows=ROWS, rewards={"value": reward})
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n") if line]
    (record,) = [r for r in lines if r["kind"] == "train"]
    assert (record["verdict"], record["alerts"][0]["key"]) == (BAD, "no_update")
