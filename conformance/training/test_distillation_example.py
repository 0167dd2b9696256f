"""The example of distillation: what it makes for a run, without running it."""

import importlib.util
import json

import numpy as np
import pytest
from places import ROOT

pytest.importorskip("safetensors", reason="the example's student is a file of safetensors")

from safetensors.numpy import load_file, save_file

from gvpo_core.training.config.file import read_config

EXAMPLE = ROOT / "examples" / "distillation"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("distillation_demo", EXAMPLE / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_measure_the_kl_to_the_teacher():
    config = read_config(EXAMPLE / "config.toml")
    assert config.objective.reference == "teacher" and config.evaluation.temperature == 1 and not config.rewards


def test_the_student_is_the_teacher_with_noise_of_the_stated_size(demo, tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    teacher.mkdir()
    rng = np.random.default_rng(0)
    tensors = {"w": 3 * rng.standard_normal((200, 300), np.float32), "norm": rng.standard_normal(300, np.float32)}
    save_file(tensors, teacher / "model.safetensors")
    (teacher / "config.json").write_text("{}")
    for _ in range(2):  # over a student that is there
        demo.disturb(teacher, student, 0.05)
        found = load_file(student / "model.safetensors")
        assert (found["norm"] == tensors["norm"]).all() and (student / "config.json").exists()
        assert (found["w"] - tensors["w"]).std() == pytest.approx(0.15, rel=0.02)  # 60,000 numbers
    assert all((load_file(teacher / "model.safetensors")[name] == value).all() for name, value in tensors.items())


def test_no_held_out_sum_is_trained_on(demo, tmp_path):
    demo.write_prompts(tmp_path / "train.jsonl", tmp_path / "held_out.jsonl")
    train, held_out = (
        [json.loads(line)["prompt"][0]["content"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    )
    sums = {frozenset(text.split("?")[0].split()[-3::2]) for text in held_out}
    assert len(held_out) == demo.HELD_OUT == len(sums) and len(train) + len(held_out) == 465
    assert not sums & {frozenset(text.split("?")[0].split()[-3::2]) for text in train}


def test_the_first_and_the_last_evaluation_are_reported(demo, tmp_path):
    records = [{"kind": "eval", "eval/teacher_kl": kl, "eval/teacher_kl_half_width": 0.5} for kl in (2.0, 1.5, 1.125)]
    lines = [json.dumps(record) for record in [records[0], {"kind": "train"}, *records[1:]]]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert [demo.kl(record) for record in demo.ends(tmp_path)] == ["2.00 +- 0.50", "1.12 +- 0.50"]
