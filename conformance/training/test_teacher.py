"""Distillation (GVPO++): a teacher in the place of pi_ref, with other tokens than the student's, on a table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from recorded_data import policy_of, records
from table_problem import BETA, PROMPTS, REFERENCE, RESPONSES, REWARDS, reward, settings, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import Config, ConfigError, TeacherConfig
from gvpo_core.training.config.backends import refuse_settings
from gvpo_core.training.evaluation import evaluate
from gvpo_core.training.loop import train
from gvpo_core.training.policy.load import load_policy
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.teacher import load_teacher
from gvpo_core.training.terminal.text import fit
from gvpo_core.training.watch.metric_names import undocumented

pytestmark = pytest.mark.core
ROWS = [{"prompt": p} for p in PROMPTS]
TEACHER = np.array([[0.5, 0.2, 0.1, 0.1, 0.1], [0.05, 0.15, 0.3, 0.4, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]])
ORDER = (3, 0, 4, 2, 1)  # the teacher's token ids of the same texts


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A table whose tokens are in another order, and whose vocabulary has a response more."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    rows = {p: {RESPONSES[y]: TEACHER[x, y] for y in ORDER} for x, p in enumerate(PROMPTS)}
    for row in rows.values():
        row["never"] = 1e-9
    (folder / "table.json").write_text(json.dumps(rows))
    return folder


def config_of(folder: Path, teacher: Path, *, rewards: bool = False, **changes) -> Config:
    config = settings(folder)
    config = replace(config, teacher=TeacherConfig(path=str(teacher)))
    config = replace(config, objective=replace(config.objective, reference="teacher", **changes))
    return config if rewards else replace(config, rewards={})


def every_record(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum(axis=1).max())


class Elsewhere:
    """Draws from another table, or uniformly: nobody's policy."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self.table = TablePolicy(table(probabilities))

    def generate(self, prompts, seeds, sampling):
        return self.table.generate(prompts, seeds, sampling)


SAMPLERS = {"student": None, "teacher": TEACHER, "uniform": np.full((3, 5), 0.2)}


@pytest.mark.slow_on("uniform")
@pytest.mark.parametrize(
    ("samples", "exponent"), [("student", 0.0), ("teacher", 0.0), ("uniform", 0.0), ("uniform", 1.0)]
)
def test_the_student_ends_at_the_teacher_for_any_sampler(samples, exponent, teacher, tmp_path, capsys):
    config = config_of(tmp_path / "run", teacher, beta=1.0, length_exponent=exponent)
    rate = 4.0 * 4**exponent  # a response of two tokens has f = 2^-exponent, and its gradient f^2
    config = replace(
        config, run=replace(config.run, steps=250), optimizer=replace(config.optimizer, learning_rate=rate)
    )
    policy = policy_of(config)
    sampler = None if SAMPLERS[samples] is None else Elsewhere(SAMPLERS[samples])
    before = kl(np.exp(policy.log_table()), TEACHER)
    train(config, policy, train_rows=ROWS, sampler=sampler)
    assert before > 0.05 and kl(np.exp(policy.log_table()), TEACHER) < 1e-6
    said = " ".join(capsys.readouterr().out.split())
    assert f"teacher {teacher}, 18 parameters, float64" in said
    first, last = records(tmp_path / "run")[0], records(tmp_path / "run")[-1]
    assert not undocumented(first) and first["teacher/unread"] == 0
    assert abs(first["kl"]) > 0.01 > abs(last["kl"])  # a KL where the student draws
    assert not {"reward/mean", "groups/all_equal", "reward/min"} & {*first}
    assert {r["verdict"] for r in records(tmp_path / "run")} <= {"OK", "WATCH"}


def test_a_reward_of_weight_0_only_measures(teacher, tmp_path):
    """All total rewards are 0, and no group is called dead."""
    config = config_of(tmp_path / "run", teacher, rewards=True)
    config = replace(config, rewards={"value": replace(config.rewards["value"], weight=0.0)})
    config = replace(config, run=replace(config.run, steps=12))
    train(config, policy_of(config), train_rows=ROWS, rewards={"value": reward})
    last = records(tmp_path / "run")[-1]
    assert last["reward/value"] > 0 == last["reward/mean"] and "groups/all_equal" not in last
    alerts = [alert["key"] for r in records(tmp_path / "run") for alert in r["alerts"]]
    assert "dead_groups" not in alerts


@pytest.mark.slow
def test_with_rewards_the_optimum_is_the_tilted_teacher(teacher, tmp_path):
    config = config_of(tmp_path / "run", teacher, rewards=True)
    policy = policy_of(config)
    train(config, policy, train_rows=ROWS, rewards={"value": reward})
    optimum = TEACHER * np.exp(REWARDS / BETA)
    optimum /= optimum.sum(axis=1, keepdims=True)
    assert kl(np.exp(policy.log_table()), optimum) < 1e-10


@pytest.mark.parametrize("rewards", [None, [0.0, 1.0, 0.5, 0.25, 0.0]])
def test_recorded_responses_distil_too(rewards, teacher, tmp_path):
    rows = [{"prompt": p, "responses": list(RESPONSES)} for p in PROMPTS]
    rows = rows if rewards is None else [row | {"rewards": rewards} for row in rows]
    policy = policy_of(config := config_of(tmp_path / "run", teacher))
    train(config, policy, train_rows=rows)
    optimum = TEACHER * (1.0 if rewards is None else np.exp(np.asarray(rewards) / BETA))
    optimum /= optimum.sum(axis=1, keepdims=True)
    assert policy.generated == 0 and kl(np.exp(policy.log_table()), optimum) < 1e-10


def test_responses_that_the_teacher_cannot_read_leave_their_group(teacher, tmp_path):
    rows = json.loads((teacher / "table.json").read_text())
    for row in rows.values():
        row.pop("a"), row.pop("never")
    (teacher / "table.json").write_text(json.dumps(rows))
    config = config_of(tmp_path / "run", teacher)
    config = replace(config, run=replace(config.run, steps=3))
    train(config, policy_of(config), train_rows=ROWS)
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    unread = sum(line["response"] == "a" for line in lines if line["step"] == 1)
    first = records(tmp_path / "run")[0]
    assert first["teacher/unread"] == first["responses/left_out"] == unread > 0


def test_a_resumed_run_and_several_ranks_repeat_it(teacher, tmp_path):
    def config_in(name, steps=8):
        config = config_of(tmp_path / name, teacher)
        return replace(config, run=replace(config.run, steps=steps, checkpoint_every=2))

    whole = policy_of(config_in("whole"))
    train(config_in("whole"), whole, train_rows=ROWS)
    config = config_in("parts")
    train(config, policy_of(config), train_rows=ROWS)
    resumed = policy_of(config)
    train(config, resumed, train_rows=ROWS, from_step=6)
    assert resumed.generated < whole.generated
    np.testing.assert_array_equal(resumed.logits, whole.logits)


def test_the_run_folder_names_the_teacher_and_refuses_another(teacher, tmp_path):
    config = config_of(tmp_path / "run", teacher)
    config = replace(config, run=replace(config.run, steps=2))
    train(config, policy_of(config), train_rows=ROWS)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "teacher_weights" in environment["model"]
    rows = json.loads((teacher / "table.json").read_text())
    (teacher / "table.json").write_text(json.dumps(rows | {"p0": rows["p1"]}))
    with pytest.raises(ConfigError, match="teacher_weights"):
        train(config, policy_of(config), train_rows=ROWS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": TeacherConfig()}, r"teacher\.path is empty; expected a model folder"),
        ({"objective": "initial"}, r"objective\.reference = 'initial'; set it to 'teacher'"),
        ({"teacher": TeacherConfig(path="nowhere")}, r"teacher\.path = 'nowhere': .*nowhere"),
        ({"teacher": {"url": "localhost:8000"}}, r"teacher\.url = 'localhost:8000'; expected http://HOST:PORT"),
        ({"teacher": {"url": "http://a:1", "api_key": "sk-1"}}, r"teacher\.api_key is not '\$NAME'"),
        ({"teacher": {"url": "http://a:1", "tries": 0}}, r"teacher\.tries = 0; expected 1 to 1,000"),
        ({"teacher": {"url": "http://a:1", "backend": "torch"}}, r"teacher\.backend is set, and the server"),
        ({"teacher": {"model": "big"}}, r"teacher\.model is set, and teacher\.url is empty"),
        ({"name": "sft"}, r"objective\.name = 'sft' reads no reference; use gvpo"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_named(changes, message, teacher, tmp_path):
    config = config_of(tmp_path / "run", teacher)
    if "teacher" in changes:
        given = changes["teacher"]
        given = replace(config.teacher, **given) if isinstance(given, dict) else given
        config = replace(config, teacher=given)
    if "objective" in changes:
        config = replace(config, objective=replace(config.objective, reference=changes["objective"]))
    if "name" in changes:
        config = replace(config, objective=replace(config.objective, name=changes["name"]))
    with pytest.raises(ConfigError, match=message):
        train(config, policy_of(config), train_rows=ROWS)


def test_held_out_prompts_need_a_reward_or_samples_at_temperature_1(teacher, tmp_path):
    config = config_of(tmp_path / "run", teacher)
    with pytest.raises(ConfigError, match=r"there is no reward: .*, or evaluation.temperature = 1.0 to measure the KL"):
        train(config, policy_of(config), train_rows=ROWS, evaluation_rows=ROWS)


def measured(config: Config, **changes) -> Config:
    return replace(config, evaluation=replace(config.evaluation, temperature=1.0, **changes))


@pytest.mark.parametrize(
    "changed",
    [{"sharding": "fsdp"}, {"mesh_fsdp": 2}, {"lora_rank": 4, "lora_kind": "dora"}, {"layout": "plain"}],
    ids=str,
)
def test_a_teacher_of_another_backend_takes_no_setting_of_the_students(changed, teacher, tmp_path, monkeypatch):
    config = config_of(tmp_path / "run", teacher)
    policy = policy_of(config)
    facts = replace(policy.describe(), backend="torch")
    monkeypatch.setattr(policy, "describe", lambda: facts)
    config = replace(config, model=replace(config.model, **changed), teacher=replace(config.teacher, backend="table"))
    with pytest.raises(ConfigError, match=f"model.{next(iter(changed))} is .* that table does not have"):
        refuse_settings(config.model, "table", config.optimizer)
    assert load_teacher(config, policy).facts.backend == "table"


@pytest.mark.slow
def test_the_held_out_kl_is_that_of_the_students_distribution(teacher, tmp_path, capsys):
    config = measured(config_of(tmp_path / "run", teacher, beta=1.0), responses=4000)
    policy = policy_of(config := replace(config, run=replace(config.run, steps=120, keep_best=True)))
    student = np.exp(policy.log_table())
    exact = (student * (np.log(student) - np.log(TEACHER))).sum(axis=1)
    train(config, policy, train_rows=ROWS, evaluation_rows=ROWS)
    first, last = (r for r in every_record(tmp_path / "run") if r["kind"] == "eval")
    assert abs(first["eval/teacher_kl"] - exact.mean()) < 0.02 < exact.mean()  # 12,000 samples
    assert abs(last["eval/teacher_kl"]) < 1e-4 and last["eval/teacher_kl_half_width"] < 1e-4
    assert "eval/reward" not in first and first["eval/prompts"] == 3 and not undocumented(first)
    said = " ".join(capsys.readouterr().out.split())
    assert "KL to the teacher" in said and f"teacher_kl {fit(first['eval/teacher_kl'], 6)}" in said
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Held-out KL to the teacher" in page


def test_a_reward_and_the_kl_are_measured_together(teacher, tmp_path):
    config = measured(config_of(tmp_path / "run", teacher, rewards=True), responses=8)
    rows = {"evaluation_rows": ROWS, "rewards": {"value": reward}}
    found = evaluate(config, policy_of(config), **rows)
    assert found["eval/reward"] > 0 and abs(found["eval/teacher_kl"]) > 0
    greedy = replace(config, evaluation=replace(config.evaluation, temperature=0.0))
    assert "eval/teacher_kl" not in evaluate(greedy, policy_of(config), **rows)


def test_the_held_out_loss_of_recorded_groups_is_that_to_the_teacher(teacher, tmp_path):
    """Eq. 16 with the teacher's log-probabilities as those of the reference."""
    scores = [0.0, 1.0, 0.5, 0.25, 0.0]
    config = config_of(tmp_path / "run", teacher)
    policy = policy_of(config)
    found = evaluate(
        config,
        policy,
        evaluation_rows=[{"prompt": p, "responses": list(RESPONSES), "rewards": scores} for p in PROMPTS],
    )
    losses = []
    for x in range(len(PROMPTS)):
        ratio = policy.log_table()[x] - np.log(TEACHER[x] / (1 + 1e-9))
        w = np.asarray(scores) - np.mean(scores) - BETA * (ratio - ratio.mean())
        losses.append((w**2).sum() / (len(w) - 1))
    assert found["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-9)


def test_several_ranks_take_the_steps_of_one(teacher, tmp_path, monkeypatch):
    """The teacher of each rank scores the rank's own responses."""
    from gvpo_core.training import inputs as inputs_module

    want = policy_of(config := config_of(tmp_path / "one", teacher))
    config = replace(config, run=replace(config.run, steps=6))
    train(config, want, train_rows=ROWS)
    monkeypatch.setattr(inputs_module, "load_teacher", lambda c, p: load_teacher(c, want))
    for size in (2, 3):
        several = replace(config, run=replace(config.run, folder=str(tmp_path / f"of{size}")))
        work = lambda policy, c=several: train(c, policy, train_rows=ROWS)
        for policy in run_ranks(size, work, table(REFERENCE), config.optimizer):
            np.testing.assert_allclose(policy.logits, want.logits, rtol=1e-11, atol=1e-11)


def test_eval_says_the_kl_its_interval_and_the_prompts(teacher, tmp_path, capsys):
    config = measured(config_of(tmp_path / "run", teacher), responses=8)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "table.json").write_text(json.dumps(table(REFERENCE)))
    rows = {name: str(tmp_path / "rows.jsonl") for name in ("train", "evaluation")}
    config = replace(config, data=replace(config.data, **rows), run=replace(config.run, steps=2))
    config = replace(config, model=replace(config.model, path=str(tmp_path / "student")))
    train(config, load_policy(config))
    last = every_record(tmp_path / "run")[-1]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    half = f"{fit(last['eval/teacher_kl_half_width'], 6)} (95 %) on 3 prompts"
    assert capsys.readouterr().out.strip() == f"newest: teacher_kl {fit(last['eval/teacher_kl'], 8)} +- {half}"
