"""The numbers of metrics.jsonl against hand-worked ones, and the dictionary against what is written."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from measured_step import encode_record, make_record, metrics_of
from places import ROOT

from gvpo_core.training import metrics
from gvpo_core.training.config.check import RESERVED_REWARD_NAMES
from gvpo_core.training.episodes.play import NUMBERS
from gvpo_core.training.intervals import student_t
from gvpo_core.training.metrics import evaluation_metrics
from gvpo_core.training.watch import metric_names
from gvpo_core.training.watch.alerts import Alerts
from gvpo_core.training.watch.metric_names import METRICS

pytestmark = pytest.mark.core

NAN = math.nan


def facts(**changes):
    """Three groups of two; the third has one score left. beta = 1/2.

    group 0: R 1, 0; s .2, -.2: D(R) .5, -.5; beta D(s) .1, -.1; w .4, -.4
    group 1: R 1, 1; s 1, 0: D(R) 0; beta D(s) .25, -.25; w -.25, .25
    """
    values = {
        "logprobs": np.array([-1.8, -2.2, -1.0, -3.0, NAN, -5.0]),  # the loop scores no row without a reward
        "ref_logprobs": np.array([-2.0, -2.0, -2.0, -3.0, NAN, -4.0]),
        "rewards": np.array([1.0, 0.0, 1.0, 1.0, NAN, 0.0]),
        "group_ids": np.array([0, 0, 1, 1, 2, 2]),
        "num_groups": 3,
        "lengths": np.array([2, 3, 1, 4, 2, 5]),
        "finished": np.array([True, True, True, True, True, False]),
        "beta": 0.5,
        "gradient_norms": [1.0, 4.0],
        "learning_rate": 1e-3,
        "seconds": {"generate": 2.0, "reward": 1.0, "score": 1.0, "update": 4.0, "checkpoint": 1.0},
        "step_seconds": 10.0,
        "tokens_computed": 40,
        "peak_memory": 2**20,
        "reward_parts": {"right": np.array([1.0, 0.0, 1.0, 1.0, NAN, 0.0]), "all lost": np.full(6, NAN)},
        "reward_errors": {"right": {"error": 0, "timeout": 1, "none": 0}},
        "reward_seconds": {"right": 0.75},
        "policy_details": {"rows": 4.0},
    }
    return values | changes


EXPECTED = {
    "reward/mean": 3 / 5,
    "reward/half_width": 4.303 * 0.5 / math.sqrt(3),  # of group means .5, 1, 0
    "reward/spread": (math.sqrt(0.5) + 0) / 2,
    "reward/min": 0,
    "reward/max": 1,
    "reward/right": 3 / 5,
    "reward/all lost": NAN,
    "reward_errors/right/error": 0,
    "reward_errors/right/timeout": 1,
    "reward_errors/right/none": 0,
    "reward_seconds/right": 0.75,
    "loss": (0.32 + 0.125) / 2,
    "loss/implicit_variance": (0.02 + 0.125) / 2,
    "loss/reward_variance": (0.5 + 0) / 2,
    "loss/covariance": (0.1 + 0) / 2,
    "regret/second_order": 0.2225,  # loss / (2 x 1/2)
    "regret/series": 0.5 * (math.log(math.cosh(0.8)) + math.log(math.cosh(0.5))) / 2,
    "kl": (0.2 - 0.2 + 1 + 0) / 4,  # the third group is not counted
    "entropy": 13 / 15,
    "gradient_norm": 2.5,
    "gradient_norm/max": 4,
    "learning_rate": 1e-3,
    "length/mean": 17 / 6,
    "length/max": 5,
    "length/best": (2 + 1 + 4) / 3,
    "length/worst": 3,  # the other was cut
    "length/truncated": 5,
    "truncated": 1 / 6,
    "responses/total": 6,
    "responses/unscored": 1,
    "groups/total": 3,
    "groups/counted": 2,
    "groups/dropped_unscored": 1,
    "groups/all_equal": 1,
    "groups/all_best": 1,
    "groups/all_worst": 0,
    "tokens/sampled": 17,
    "tokens/computed": 40,
    "tokens_per_second": 17 / 8,
    "seconds/generate": 2,
    "seconds/reward": 1,
    "seconds/score": 1,
    "seconds/update": 4,
    "seconds/checkpoint": 1,
    "seconds/other": 1,
    "seconds/step": 10,
    "share/generate": 0.2,
    "share/reward": 0.1,
    "share/score": 0.1,
    "share/update": 0.4,
    "share/checkpoint": 0.1,
    "share/other": 0.1,
    "memory/peak": 2**20,
    "policy/rows": 4,
}


def test_every_number_of_a_step_is_the_hand_worked_one():
    got = metrics_of(**facts())
    assert set(got) == set(EXPECTED)
    for key, value in EXPECTED.items():
        assert got[key] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), key


def test_a_nan_in_what_the_loss_counts_is_not_hidden():
    logprobs = np.array([-1.8, NAN, -1.0, -3.0, NAN, -5.0])
    got = metrics_of(**facts(logprobs=logprobs))
    assert all(math.isnan(got[key]) for key in ("entropy", "kl", "loss", "regret/second_order"))


def test_rows_that_no_update_scored_leave_the_rest_finite():
    """A group with one score, alone in its mini-batch, never meets the policy."""
    none = np.array([-1.8, -2.2, -1.0, -3.0, NAN, NAN])
    got = metrics_of(**facts(logprobs=none, ref_logprobs=np.where(np.isnan(none), NAN, -2.0)))
    assert got["entropy"] == pytest.approx(8 / 10)
    assert [key for key, value in got.items() if not math.isfinite(value)] == ["reward/all lost"]


def test_row_order_does_not_matter():
    order = np.array([4, 1, 3, 0, 5, 2])
    base = facts()
    names = ("logprobs", "ref_logprobs", "rewards", "group_ids", "lengths", "finished")
    parts = {name: values[order] for name, values in base["reward_parts"].items()}
    shuffled = facts(**{name: base[name][order] for name in names}, reward_parts=parts)
    got, want = metrics_of(**shuffled), metrics_of(**base)
    assert set(got) == set(want)
    for key in want:
        assert got[key] == pytest.approx(want[key], rel=1e-12, nan_ok=True), key


def test_beta_zero_has_no_regret():
    got = metrics_of(**facts(beta=0.0))
    assert "regret/series" not in got and "regret/second_order" not in got
    assert got["loss"] == pytest.approx(got["loss/reward_variance"])


def test_no_scored_response_leaves_out_what_has_no_value():
    got = metrics_of(**facts(rewards=np.full(6, NAN)))
    assert got["responses/unscored"] == 6 and got["groups/dropped_unscored"] == 3 and got["loss"] == 0
    assert not {"reward/mean", "kl", "length/best", "groups/all_best"} & set(got)


def test_one_value_so_far_is_neither_best_nor_worst():
    rewards = np.ones(6)
    alone = metrics_of(**facts(rewards=rewards))
    assert (alone["groups/all_equal"], alone["groups/all_best"], alone["groups/all_worst"]) == (3, 0, 0)
    known = metrics_of(**facts(rewards=rewards, reward_range=(0.0, 1.0)))
    assert (known["groups/all_best"], known["groups/all_worst"]) == (3, 0)
    low = metrics_of(**facts(rewards=0 * rewards, reward_range=(0.0, 1.0)))
    assert (low["groups/all_best"], low["groups/all_worst"]) == (0, 3)


def test_step_seconds_default_to_the_sum_of_phases():
    got = metrics_of(**facts(seconds={"generate": 3.0, "update": 1.0}, step_seconds=None))
    assert got["seconds/step"] == 4 and got["share/generate"] == 0.75 and "seconds/other" not in got


def test_evaluation_hand_worked():
    rewards = np.array([1.0, 0.0, 3.0, NAN, NAN, 1.0])  # prompt means .5, 3, 1 (b's other answer has no score)
    got = evaluation_metrics(
        rewards,
        ["a", "a", "b", "b", "c", "d"],
        np.array([1, 2, 3, 4, 5, 9]),
        np.array([True] * 5 + [False]),
        seconds=7.0,
        reward_parts={"right": rewards},
    )
    deviation = math.sqrt(((0.5 - 1.5) ** 2 + (3 - 1.5) ** 2 + (1 - 1.5) ** 2) / 2)
    assert got == pytest.approx(
        {
            "eval/reward": 1.5,
            "eval/half_width": 4.303 * deviation / math.sqrt(3),
            "eval/reward/right": 5 / 4,
            "eval/length": 4,
            "eval/truncated": 1 / 6,
            "eval/prompts": 3,
            "eval/unscored": 2,
            "seconds/evaluate": 7,
        }
    )


def test_zero_right_of_24_is_not_called_certain():
    got = evaluation_metrics(np.zeros(24), range(24), np.ones(24), np.ones(24, bool), seconds=0.0)
    assert got["eval/reward"] == 0
    assert got["eval/half_width"] == pytest.approx(1.959964**2 / (24 + 1.959964**2))  # Wilson's upper end at p = 0


@pytest.mark.parametrize(("freedom", "want"), [(1, 12.706), (10, 2.228), (11, 2.201), (30, 2.042), (1000, 1.962)])
def test_student_t(freedom, want):
    assert student_t(freedom) == pytest.approx(want, abs=1e-3)


def test_every_key_is_documented_and_every_documented_key_is_written():
    step = make_record("train", 1, metrics_of(**facts(seconds=dict.fromkeys(metric_names.PHASES, 1.0))))
    alerts = Alerts.replay([step])
    step |= alerts.annotate(step)
    evaluation = make_record(
        "eval",
        1,
        evaluation_metrics(np.ones(2), [0, 1], np.ones(2), np.ones(2), seconds=1.0, reward_parts={"right": np.ones(2)}),
    )
    played = evaluation_metrics(np.ones(2), [0, 1], np.ones(2), np.ones(2), seconds=1.0, episodes=np.ones((2, NUMBERS)))
    event = make_record("event", 1, {"event": "resume", "message": "from step 1"})
    recorded = {"nll", "log_ratio", "groups/skipped", "machine/reference_cached", "machine/reference_scored"}
    losses = {"eval/loss", "eval/accuracy", "eval/nll", "eval/groups"}  # test_recorded.py writes these
    samplers = {"responses/lost", "eval/lost", "sampler/retokenized", "sampler/gap", "sampler/gap/max"}
    samplers |= {"sampler/staleness", "sampler/staleness/max"}  # test_sampler*.py write these
    mixtures = {"responses/left_out", "groups/left_out", "groups/redrawn", "groups/recorded", "groups/replayed"}
    mixtures |= {"groups/revisited", "replay/age", "replay/kept"}  # test_mixed.py writes these
    mixtures |= {"teacher/unread", "teacher/lost"}  # test_teacher.py writes these
    mixtures |= {"eval/teacher_kl", "eval/teacher_kl_half_width"}
    episodes = {"turns/mean", "turns/max", "tools/calls", "tools/failed", "episodes/seconds", "episodes/repeated"}
    episodes |= {
        "episodes/done",
        "episodes/turns",
        "episodes/tokens",
        "episodes/failed",
        "episodes/prefilled",
        "episodes/reused",
        "episodes/segments",
        "length/context",
    }
    others = recorded | losses | samplers | mixtures | episodes
    written = {**step, **evaluation, **played, **event} | dict.fromkeys(others, 1.0)
    assert metric_names.undocumented(written) == []
    for key, pattern in zip(METRICS, metric_names._PATTERNS, strict=True):
        assert any(pattern.fullmatch(k) for k in written), f"{key} is documented and never written"
    assert metric_names.undocumented({"reward/a/b": 1, "lose": 1, "seconds/lunch": 1}) == ["lose", "seconds/lunch"]


def test_reserved_names_are_those_that_would_collide():
    keys = {m[1] for key in METRICS if (m := re.fullmatch(r"reward/(\w+)", key))}
    assert keys == RESERVED_REWARD_NAMES


def test_records_are_read_and_a_cut_line_is_passed_over(tmp_path: Path):
    record = make_record("train", 3, {"loss": 0.5, "kl": NAN, "n": 2}, now=1.5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(encode_record(record) + '[1]\n{"kind": "tra', encoding="utf-8")
    assert list(metrics.read_records(path)) == [record]


def test_an_evaluation_of_episodes_counts_each_limit():
    ends = np.eye(4)[[0, 1, 1, 2]]  # done, turns, turns, tokens
    rows = np.concatenate([np.ones((4, NUMBERS - 4)), ends], axis=1)
    rows = np.concatenate([rows, np.full((1, NUMBERS), np.nan)])  # another rank's prompt without an episode
    finished = np.asarray([True, False, False, False, True])
    given = (np.ones(5), range(5), np.ones(5), finished)
    for rewarded in (True, False):
        metrics = evaluation_metrics(*given, seconds=1.0, rewarded=rewarded, episodes=rows)
        shares = {name: metrics[f"eval/episodes/{name}"] for name in ("done", "turns", "tokens", "failed")}
        assert shares == {"done": 0.25, "turns": 0.5, "tokens": 0.25, "failed": 0.0}
    assert not [key for key in evaluation_metrics(*given, seconds=1.0) if key.startswith("eval/episodes")]


def test_the_page_in_docs_is_the_dictionary():
    page = ROOT / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == metric_names.metrics_page(), (
        'python -c "from gvpo_core.training.watch.metric_names import metrics_page as p; print(p(), end=str())"'
        " > docs/metrics.md"
    )
