"""What the report says in words: noise is called noise, and a change is one of the same prompts."""

import numpy as np
import pytest
from made_up_run import run_of

from gvpo_core.training.report.changes import held_out_change, plus_minus, signs_tell
from gvpo_core.training.report.reading import read_out
from gvpo_core.training.report.sections import sections

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("value", "half", "text"),
    [(0.0737, 0.0246, "0.074 ± 0.025"), (1.0, 0.107, "1.00 ± 0.11"), (0.00623, 0.000043, "0.00623 ± 0.00004"),
     (1234.5, 56.7, "1234 ± 57"), (0.0, 0.138, "0.00 ± 0.14"), (0.5, 0.0, "0.5 ± 0"), (0.5, np.nan, "0.5 ± ?")],
)  # fmt: skip
def test_a_number_has_the_digits_of_its_half_width(value, half, text):
    assert plus_minus(value, half) == text


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        (np.ones(6), True),
        (np.ones(5), None),  # 2 of 2^5 outcomes: 6 %
        (np.zeros(24), False),
        (np.zeros(3), None),
        (np.array([1.0] * 12 + [-1.0] * 10), False),
        (np.array([1.0] * 20 + [-1.0] * 5 + [0.0] * 7), True),
    ],
)
def test_what_counts_as_noise(differences, verdict):
    assert signs_tell(differences) is verdict


@pytest.mark.parametrize("value", [None, 0.0])
def test_the_chart_of_failed_responses_explains_their_score(value):
    config = {"rewards": {"judge": {"failure_value": value} if value is not None else {}, "other": {}}}
    run = run_of(config=config, reward_errors__judge__error=[17], reward_errors__judge__none=[0], responses__total=[48])
    (chart,) = [c for _, charts in sections(run) for c in charts if "failed" in c.title]
    if value is None:
        assert "These responses leave their group; they do not count as zero." in chart.reading
    else:
        assert "count as the failure_value: 0 (judge); others leave their group." in chart.reading


def evaluated_run(before, after):
    """A run whose held-out prompts scored these rewards first and last; None: unscored."""
    rows = [
        [{"group": i, "prompt": f"p{i}", "response": "", "reward": reward} for i, reward in enumerate(rewards)]
        for rewards in (before, after)
    ]
    evaluations = [
        {"step": step, "eval/reward": float(np.mean([r for r in rewards if r is not None])), "eval/half_width": 0.1}
        for step, rewards in ((0, before), (9, after))
    ]
    run = run_of(evaluations=[e | {"eval/prompts": len(before)} for e in evaluations])
    run.held_out = dict(zip((0, 9), rows, strict=True))
    return run


def test_a_paired_change_compares_the_means_of_the_same_prompts():
    # Over all scored prompts the mean rises by 0.6; over the prompts scored both times it falls by 0.5.
    before, after = [1.0, *np.linspace(1, 2, 9), -9.0], [0.5, *(np.linspace(1, 2, 9) - 0.5), None]
    run = evaluated_run(before, after)
    rises = run.evaluations[1]["eval/reward"] - run.evaluations[0]["eval/reward"]
    assert rises > 0.4  # the unpaired means would be told the other way round
    change = held_out_change(run)
    assert (change.start, change.end, change.paired) == (pytest.approx(1.45), pytest.approx(0.95), 10)
    assert change.end - change.start == pytest.approx(change.difference)
    said = read_out(run).sentences[0]
    assert "fell from 1.45 ± 0.26 to 0.95 ± 0.26 (over 10 prompts)" in said and "-0.5 ± 0, paired by prompt" in said


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        (np.full(40, 0.001), "was -1.98 ± 0.40 at first and -1.98 ± 0.40 at last"),  # real, not in the digits
        (np.linspace(-1, 1.1, 40), "within noise"),
        (np.array([0.1] * 5), "too little data to tell"),
        (np.array([1e-3] * 30 + [40.0]), "within noise"),  # the interval includes 0, though all signs agree
        (np.full(40, -1.0), "fell from"),
        (np.full(40, 1.0), "rose from"),
    ],
)
def test_rose_and_fell_are_reported_only_where_digits_and_interval_show_it(differences, said):
    before = np.linspace(-1.98 - 2.1, -1.98 + 2.1, len(differences))
    sentence = read_out(evaluated_run(list(before), list(before + differences))).sentences[0]
    assert said in sentence
    assert (" rose " in sentence or " fell " in sentence) == ("from" in said)


def test_a_share_of_right_prompts_has_wilsons_interval_in_the_words_too():
    change = held_out_change(evaluated_run([0.0] * 20, [1.0] * 20))
    assert change.start_half == pytest.approx(0.16113, abs=1e-4) == change.end_half  # Wilson, 0 of 20: (0, 0.16113)
    assert change.difference == 1.0 and change.beyond_noise is True


def test_noise_is_called_noise_and_little_is_called_little():
    evaluations = [
        {"step": s, "eval/reward": r, "eval/half_width": 0.1, "eval/prompts": 20} for s, r in ((0, 0.5), (9, 0.55))
    ]
    said = " ".join(read_out(run_of(evaluations=evaluations)).sentences)
    assert "within noise: it does not show a change" in said
    assert "no second evaluation" in " ".join(read_out(run_of(evaluations=evaluations[:1])).sentences)
    assert "does not show how the model does on new prompts" in " ".join(read_out(run_of()).sentences)
    alone = [e | {"eval/half_width": None} for e in evaluations]
    assert "too little data to tell" in " ".join(read_out(run_of(evaluations=alone)).sentences)


def test_a_run_that_failed_says_so_until_it_is_resumed():
    failed, resumed = ({"kind": "event", "step": step, "event": kind} for step, kind in ((3, "failed"), (2, "resume")))
    said = lambda *events: " ".join(
        read_out(run_of(config={"run": {"steps": 9}}, events=events, reward__mean=[0.1, 0.2])).sentences
    )
    assert "It failed at step 3 of 9" in said(failed)
    assert "It failed" not in said(failed, resumed) and "It is at step 2 of 9" in said(failed, resumed)
