"""rollout.sampler = "teacher": the model of [teacher] draws, beside the policy's own responses in one group."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import table_run
from killing import lasting
from recorded_data import policy_of
from sampler_runs import lines
from table_problem import PROMPTS, REFERENCE, RESPONSES, reward, settings, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import ConfigError, TeacherConfig
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Text
from gvpo_core.training.sampling import Sampling
from gvpo_core.training.teacher import load
from gvpo_core.training.teacher.sampler import TeacherSampler
from gvpo_core.training.teacher.taught import Teacher

pytestmark = pytest.mark.core
ROWS = [{"prompt": p} for p in PROMPTS]
ONLY = {"p0": "d", "p1": "e", "p2": "c"}  # what the teacher says; its token ids are others than the student's


@pytest.fixture
def teacher(tmp_path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    rows = {p: {r: 1.0 if r == said else 1e-12 for r in reversed(RESPONSES)} for p, said in reversed(ONLY.items())}
    (folder / "table.json").write_text(json.dumps(rows))
    return folder


def config_of(folder: Path, teacher: Path, *, own: int, steps: int = 4):
    config = settings(folder)
    rollout = replace(config.rollout, sampler="teacher", responses=8, own_responses=own)
    run = replace(config.run, steps=steps, checkpoint_every=2)
    return replace(config, run=run, rollout=rollout, teacher=TeacherConfig(path=str(teacher)))


def drawn(folder: Path) -> dict:
    by_group: dict = {}
    for c in lines(settings(folder), "completions"):
        if c["kind"] == "train":
            by_group.setdefault((c["step"], c["prompt"]), []).append(c["response"])
    return by_group


def test_a_group_holds_the_teachers_responses_beside_the_policys_own(teacher, tmp_path, capsys):
    config = config_of(tmp_path / "run", teacher, own=5)
    policy = TablePolicy(table(REFERENCE), config.optimizer)
    train(config, policy, train_rows=ROWS, rewards={"value": reward})
    groups = drawn(tmp_path / "run")
    assert len(groups) == 4 * 3 and {len(group) for group in groups.values()} == {8}
    for (_, prompt), group in groups.items():
        assert group[5:] == [ONLY[prompt]] * 3
    assert any(set(group[:5]) - {ONLY[p]} for (_, p), group in groups.items()), "the policy drew nothing of its own"
    said = " ".join(capsys.readouterr().out.split())
    assert "8 responses (5 the policy's own)" in said and f"sampler the teacher, {teacher}, 15 parameters" in said
    last = [m for m in lines(config, "metrics") if m["kind"] == "train"][-1]
    assert last["responses/lost"] == 0 and {"kl", "nll"} <= last.keys()


@pytest.mark.parametrize("reference", ["initial", "teacher"])
def test_a_run_resumes_bit_for_bit_with_one_teacher(reference, teacher, tmp_path, monkeypatch):
    tables, loaded = [], []
    made = Teacher.__init__
    monkeypatch.setattr(Teacher, "__init__", lambda self, *given: (loaded.append(1), made(self, *given))[1])
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for steps in stops:
            config = config_of(tmp_path / name, teacher, own=4)
            config = replace(config, objective=replace(config.objective, reference=reference))
            config = replace(config, run=replace(config.run, steps=steps, allow_changes=True))
            policy = policy_of(config)
            train(config, policy, train_rows=ROWS, rewards={"value": reward})
        tables.append(policy.log_table())
    assert np.array_equal(*tables) and len(loaded) == 3, "the teacher that draws is the one that scores"
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "parts")


def test_its_responses_are_those_of_the_model_with_these_seeds(teacher):
    """Spread over several; a prompt that does not fit its context has none."""
    (teacher / "table.json").write_text(json.dumps({p: {r: 1.0 + len(r + p) for r in RESPONSES} for p in PROMPTS}))
    config = config_of(teacher, teacher, own=0)
    sampler = TeacherSampler(config, TablePolicy(table(REFERENCE)))
    seeds = [[1, 2, 3], [4, 5]]
    model = sampler.teacher.scorer
    want = [[model.decode(r.tokens) for r in many] for many in model.generate([(0,), (2,)], seeds, Sampling(2))]
    assert sampler.messages and len({text for many in want for text in many}) > 1
    given = sampler.generate([PROMPTS[0], PROMPTS[2]], seeds, Sampling(2))
    assert given == [[Text(text, True) for text in many] for many in want]
    assert sampler.generate([PROMPTS[0]], [[1]], Sampling(1)) == [[Text(want[0][0], False)]]
    sampler.teacher.context = 2
    assert sampler.generate([PROMPTS[0]], [[1]], Sampling(2)) == [[]]
    assert sampler.failures == ["prompt and response are longer than the teacher's context, 2"]


def test_the_teachers_responses_can_be_collected(tmp_path, capsys):
    config = table_run.make(tmp_path, steps=2)
    (tmp_path / "teacher").mkdir()
    rows = {p: {"d": 1.0} for p in table_run.PROMPTS}
    (tmp_path / "teacher" / "table.json").write_text(json.dumps(rows))
    out = tmp_path / "groups.jsonl"
    given = ["--rollout.sampler", "teacher", "--teacher.path", str(tmp_path / "teacher")]
    assert main(["collect", str(config), str(out), *given]) == 0
    groups = [json.loads(line) for line in out.read_text().splitlines()]
    assert {response for group in groups for response in group["responses"]} == {"d"}
    assert main(["train", str(config), "--dry-run", *given]) == 0
    assert "sampler the teacher" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ([], "rollout.sampler = 'teacher', and teacher.path is empty"),
        (["--teacher.path", "x", "--teacher.url", "http://h"], "teacher.url is set: its server scores"),
        (["--teacher.path", "x", "--rollout.ahead", "1"], "it draws on the device that the update needs"),
        (["--teacher.path", "x", "--environment.tools", "a:b"], "the teacher draws no turns of episodes"),
        (["--teacher.path", "x", "--evaluation.sampler", "rollout"], "the teacher would be evaluated, not the policy"),
        (
            ["--teacher.path", "x", "--objective.name", "grpo"],
            "rollout.sampler = 'teacher'; objective.name = 'grpo' weighs",
        ),
    ],
)
def test_what_the_teacher_cannot_draw_is_refused(options, wanted, tmp_path, capsys):
    config = table_run.make(tmp_path)
    path = [str(tmp_path) if option == "x" else option for option in options]
    assert main(["train", str(config), "--rollout.sampler", "teacher", *path]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said", "wanted"),
    [
        ([], "model.path 'gone' is not a folder", "teacher.path 'gone' is not a folder"),
        (["--teacher.device", "cuda:7"], "model.device is 'cuda:7'", "teacher.device is 'cuda:7'"),
        ([], "model.device is 'cuda:7'", "teacher.path = 'gone': model.device is 'cuda:7'"),  # it is the policy's
        ([], "it has no weights", "teacher.path = 'gone': it has no weights"),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_named_by_its_own_settings(
    option, said, wanted, tmp_path, capsys, monkeypatch
):
    def fails(*_, **__):
        raise ConfigError(said)

    monkeypatch.setattr(load, "load_policy", fails)
    given = ["--rollout.sampler", "teacher", "--teacher.path", "gone", *option]
    assert main(["train", str(table_run.make(tmp_path)), *given]) == 2
    assert f"gvpo: {wanted}\n" in capsys.readouterr().err
