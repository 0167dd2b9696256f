"""What the report says in words: noise is called noise, each trouble has its warning, a healthy run has none."""

import numpy as np
import pytest
from made_up_run import run_of

from gvpo_core.training.report.reading import plus_minus, read_out, signs_tell
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


def warned(**facts):
    return " | ".join(read_out(run_of(**facts)).warnings)


def test_each_trouble_has_its_warning_and_a_healthy_run_has_none():
    rising = list(np.linspace(0.1, 0.9, 40))
    healthy = {"reward__mean": rising, "reward__half_width": [0.05] * 40, "kl": list(np.linspace(0, 2, 40))}
    healthy |= {"truncated": [0.02] * 40, "entropy": [0.8] * 40, "loss": [0.1] * 40, "gradient_norm": [1.0] * 40}
    healthy |= {"groups__counted": [8] * 40, "groups__all_equal": [2] * 40, "responses__total": [64] * 40}
    config = {"objective": {"beta": 0.05}, "rollout": {"max_tokens": 16}, "run": {"steps": 40}}
    assert warned(config=config, **healthy) == ""

    def with_(**changes):
        return warned(config=config, **(healthy | changes))

    assert "35% of the last responses were cut at the limit of 16 tokens" in with_(truncated=[0.0] * 20 + [0.35] * 20)
    dead = {"groups__all_equal": [7] * 40, "groups__all_best": [0] * 40, "groups__all_worst": [6] * 40}
    assert "88% of the last groups were dead" in with_(**dead) and "easier prompts" in with_(**dead)
    flat = with_(reward__mean=[0.5] * 40)
    assert "KL cost more than it bought: beta x KL grew by 0.0769" in flat
    assert with_(kl=[None] * 40) == "" and with_(kl=[None] * 5 + [1.0] * 35) == ""
    jump = list(np.linspace(0, 2, 40))
    jump[30] = 20.0
    assert "KL jumped to 20 nats a response at step 31" in with_(kl=jump)
    assert "Entropy fell from 0.8 to 0.05" in with_(entropy=[0.8] * 20 + [0.05] * 20)
    assert "loss was not a finite number in 2 steps, first at step 39" in with_(loss=[0.1] * 38 + [None] * 2)
    timeouts = {"reward_errors__judge__timeout": [0] * 39 + [64]}
    assert "Reward 'judge' ran out of time on 64 of 2,560 responses (2.5%)" in with_(**timeouts)


@pytest.mark.parametrize(("value", "said"), [(None, "left their groups"), (0.0, "counted as 0, its failure_value")])
def test_what_became_of_a_failed_response_is_said_as_it_was(value, said):
    config = {"rewards": {"judge": {"failure_value": value} if value is not None else {}, "other": {}}}
    facts = {"reward_errors__judge__error": [17], "reward_errors__judge__none": [0], "responses__total": [48]}
    run = run_of(config=config, **facts)
    (warning,) = read_out(run).warnings
    assert warning == f"Reward 'judge' raised an error on 17 of 48 responses (35.4%); they {said}."
    (chart,) = [c for _, charts in sections(run) for c in charts if "failed" in c.title]
    if value is None:
        assert "They leave their group; they never count as zero." in chart.reading
    else:
        assert "count as the failure_value: 0 (judge); others leave their group." in chart.reading
    unscored = warned(config=config, **facts | {"reward_errors__judge__error": [0], "reward_errors__judge__none": [3]})
    assert unscored == "Reward 'judge' gave no score to 3 of 48 responses (6.2%); they left their groups."


def test_noise_is_called_noise_and_little_is_called_little():
    evaluations = [
        {"step": s, "eval/reward": r, "eval/half_width": 0.1, "eval/prompts": 20} for s, r in ((0, 0.5), (9, 0.55))
    ]
    said = " ".join(read_out(run_of(evaluations=evaluations)).sentences)
    assert "within noise: it does not show a change" in said
    assert "no second evaluation" in " ".join(read_out(run_of(evaluations=evaluations[:1])).sentences)
    assert "nothing here says how the model does on new prompts" in " ".join(read_out(run_of()).sentences)
    alone = [e | {"eval/half_width": None} for e in evaluations]
    assert "too little to tell" in " ".join(read_out(run_of(evaluations=alone)).sentences)


def test_a_run_that_failed_says_so_until_it_is_resumed():
    failed, resumed = ({"kind": "event", "step": step, "event": kind} for step, kind in ((3, "failed"), (2, "resume")))
    said = lambda *events: " ".join(
        read_out(run_of(config={"run": {"steps": 9}}, events=events, reward__mean=[0.1, 0.2])).sentences
    )
    assert "It failed at step 3 of 9" in said(failed)
    assert "It failed" not in said(failed, resumed) and "It stands at step 2 of 9" in said(failed, resumed)
