"""Replay, mixtures of sources, groups that are drawn again, and responses left out: on the table policy."""

import json
from dataclasses import replace

import numpy as np
import pytest
from ranks import run_ranks
from recorded_data import Counting, config_of, groups, policy_of, records
from table_problem import BETA, PROMPTS, REFERENCE, RESPONSES, REWARDS, reward, table

from gvpo_core.training.config import ConfigError, RewardConfig
from gvpo_core.training.data import DataError
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Response
from gvpo_core.training.rollout import stopped
from gvpo_core.training.watch.metric_names import undocumented

pytestmark = pytest.mark.core
ROWS = [{"prompt": p} for p in PROMPTS]


def sampled_config(folder, **sections):
    config = config_of(folder, **({"rollout": {"prompts": 4, "responses": 6}} | sections))
    return replace(config, rewards={"value": RewardConfig(function="given")})


def run(config, rows=ROWS, policy=None, function=reward, **options):
    policy = policy or policy_of(config)
    train(config, policy, train_rows=rows, rewards={"value": function}, **options)
    return policy


def completions(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def step_by_hand(logits: np.ndarray, rows: list[dict], rate: float) -> np.ndarray:
    """One step of plain gradient descent along Eq. 16's loss / (2 beta), from the equations, on recorded lines."""
    log_pi = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    members: dict[int, list[dict]] = {}
    for row in rows:
        if not row.get("left_out"):
            members.setdefault(row["group"], []).append(row)
    gradient = np.zeros_like(logits)
    for group in members.values():
        x = PROMPTS.index(group[0]["prompt"])
        ys = [RESPONSES.index(row["response"]) for row in group]
        r, s = np.array([row["reward"] for row in group]), log_pi[x, ys] - np.log(REFERENCE[x, ys])
        c = ((r - r.mean()) - BETA * (s - s.mean())) / ((len(group) - 1) * len(members))
        gradient[x] += c.sum() * np.exp(log_pi[x])
        np.add.at(gradient[x], ys, -c)
    return logits - rate * gradient


def assert_steps_by_hand(folder, config, policy):
    """Every step equals the float64 reference on the groups that the run recorded."""
    lines, want = completions(folder), np.log(REFERENCE)
    for step in range(1, config.run.steps + 1):
        want = step_by_hand(want, [row for row in lines if row["step"] == step], config.optimizer.learning_rate)
    centred = [x - x.mean(1, keepdims=True) for x in (policy.logits, want)]
    np.testing.assert_allclose(*centred, rtol=1e-10, atol=1e-10)


REPLAY = {"replay": {"groups": 12, "share": 0.5}}


@pytest.fixture
def recorded_file(tmp_path):
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in groups()))
    return path


def of_kind(kind, path):
    """The settings of one mixture, and the training rows."""
    beside = {"data": {"recorded": str(path), "recorded_share": 0.25}}
    return {
        "replay": (REPLAY, ROWS),
        "recorded": (beside, ROWS),
        "both": (REPLAY | beside, ROWS),
        "within": ({"rollout": {"prompts": 4, "responses": 6, "source": "mixed"}}, groups()),
        "within-replay": (REPLAY | {"rollout": {"prompts": 4, "responses": 6, "source": "mixed"}}, groups()),
        "redraw": ({"rollout": {"prompts": 4, "responses": 2, "equal": "redraw"}}, ROWS),
        "curriculum": (
            {"data": {"curriculum": 0.5}, "rollout": {"prompts": 4, "responses": 2, "equal": "redraw"}},
            ROWS,
        ),
    }[kind]


KINDS = ["replay", "recorded", "both", "within", "within-replay", "redraw", "curriculum"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_equal_the_float64_reference(kind, recorded_file, tmp_path):
    sections, rows = of_kind(kind, recorded_file)
    config = sampled_config(tmp_path / "run", **sections)
    policy = run(config, rows)
    assert_steps_by_hand(tmp_path / "run", config, policy)
    last = records(tmp_path / "run")[-1]
    assert not undocumented(last)
    if "replay" in kind or kind == "both":
        assert last["groups/replayed"] == 2 and last["replay/age"] >= 1 and last["replay/kept"] > 2
    if kind in ("recorded", "both"):
        assert last["groups/recorded"] == 1
    if "within" in kind:
        groups_drawn = {line["group"] for line in completions(tmp_path / "run") if line["step"] == 1}
        assert len(groups_drawn) == (2 if kind == "within-replay" else 4)
    if kind == "curriculum":
        assert last["groups/revisited"] == 2
    if kind == "redraw":
        assert any(r["groups/redrawn"] for r in records(tmp_path / "run"))


class Last:
    """A sampler that draws the last response, whatever the policy."""

    def generate(self, prompts, seeds, sampling):
        ids = policy_of(config_of("x")).encode_responses("", [RESPONSES[-1]], [True])[0].tokens
        return [[Response(ids, True) for _ in row] for row in seeds]


def test_a_samplers_responses_beside_the_policys_own_take_the_step_of_the_reference(tmp_path):
    config = sampled_config(tmp_path, rollout={"prompts": 4, "responses": 6, "own_responses": 4})
    policy = run(config, sampler=Last())
    assert_steps_by_hand(tmp_path, config, policy)
    by_group = {}
    for line in completions(tmp_path):
        by_group.setdefault((line["step"], line["group"]), []).append(line["response"])
    assert all(group[4:] == [RESPONSES[-1]] * 2 for group in by_group.values())
    assert sum(response != RESPONSES[-1] for group in by_group.values() for response in group[:4]) > 10


@pytest.mark.parametrize("kind", ["recorded", "both", "within", "unscored"])
def test_the_reference_scores_recorded_responses_once(kind, recorded_file, tmp_path):
    """In 40 steps each file passes several times; the drawn responses alone are scored in each step."""
    if kind == "unscored":
        sections, rows = of_kind("within", recorded_file)[0], [{"prompt": p, "responses": ["c", "a"]} for p in PROMPTS]
    else:
        sections, rows = of_kind(kind, recorded_file)
    config = sampled_config(tmp_path / "run", **sections)
    config = replace(config, run=replace(config.run, steps=20))
    first = run(config, rows)
    metrics = records(tmp_path / "run")
    scored = [m["machine/reference_scored"] for m in metrics]
    cached = sum(m["machine/reference_cached"] for m in metrics)
    assert sum(scored) > 0 and not any(scored[10:]) and cached > 2 * sum(scored), scored
    assert first.reference_rows == sum(m["responses/total"] for m in metrics) - cached
    assert_steps_by_hand(tmp_path / "run", config, first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_identical(kind, recorded_file, tmp_path):
    """Stopped after a step, with a full buffer and prompts taken beyond their number."""
    sections, rows = of_kind(kind, recorded_file)
    whole = run(sampled_config(tmp_path / "whole", **sections), rows)
    config = sampled_config(tmp_path / "parts", **sections)

    class Killed(Exception):
        pass

    class Dying(Counting):
        def update(self, *args, **options):
            if self.update_count == 5:
                raise Killed
            return super().update(*args, **options)

    with pytest.raises(Killed):
        run(config, rows, Dying(table(REFERENCE), config.optimizer, updates=config.updates))
    resumed = run(config, rows)
    assert resumed.update_count == 6 and resumed.generated < whole.generated
    np.testing.assert_array_equal(resumed.logits, whole.logits)
    assert completions(tmp_path / "parts") == completions(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_change_nothing(kind, recorded_file, tmp_path):
    sections, rows = of_kind(kind, recorded_file)
    want = run(sampled_config(tmp_path / "one", **sections), rows)
    for size in (2, 3):
        config = sampled_config(tmp_path / f"of{size}", **sections)
        work = lambda policy, c=config: train(c, policy, train_rows=rows, rewards={"value": reward})
        for policy in run_ranks(size, work, table(REFERENCE), config.optimizer):
            np.testing.assert_allclose(policy.logits, want.logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["recorded", "within"])  # the others' steps differ in their number of groups
def test_a_run_fed_from_its_own_completions_takes_the_same_steps(kind, recorded_file, tmp_path):
    sections, rows = of_kind(kind, recorded_file)
    config = sampled_config(tmp_path / "a", **sections)
    first = run(config, rows)
    fed = config_of(tmp_path / "b", data={"train": str(tmp_path / "a" / "completions.jsonl")}, rollout={"prompts": 4})
    second = policy_of(fed)
    train(fed, second)
    assert second.generated == 0
    np.testing.assert_allclose(second.logits, first.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_replay_reaches_the_optimum(tmp_path):
    """Cor. 3.2: half of each step are old samples, and there is no ratio; KL(pi || pi*) < 1e-6."""
    config = sampled_config(
        tmp_path, rollout={"prompts": 6, "responses": 16}, run={"steps": 200, "checkpoint_every": 0},
        replay={"groups": 60, "share": 0.5},
    )  # fmt: skip
    policy = run(config)
    optimum = REFERENCE * np.exp(REWARDS / BETA)
    optimum /= optimum.sum(axis=1, keepdims=True)
    pi = np.exp(policy.log_table())
    assert records(tmp_path)[-1]["groups/replayed"] == 3
    assert (pi * np.log(pi / optimum)).sum(axis=1).max() < 1e-6


def test_replayed_groups_are_no_older_than_asked_for(tmp_path):
    config = sampled_config(tmp_path, replay={"groups": 100, "share": 0.5, "age": 2}, run={"steps": 9})
    run(config)
    ages = [r["replay/age"] for r in records(tmp_path) if "replay/age" in r]
    assert len(ages) == 8 and max(ages) <= 2
    assert records(tmp_path)[-1]["replay/kept"] == 18


def test_a_mixture_is_judged_by_what_was_drawn(recorded_file, tmp_path):
    rows = [row | {"rewards": [100.0] * len(row["rewards"])} for row in groups()]
    recorded_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = sampled_config(tmp_path / "run", data={"recorded": str(recorded_file), "recorded_share": 0.5})
    run(config)
    record = records(tmp_path / "run")[0]
    assert record["reward/mean"] <= 1 and record["reward/value"] <= 1 and record["reward/max"] <= 1
    assert {"kl", "log_ratio", "entropy", "nll"} <= {*record}


def test_demonstrations_in_a_group_are_scored_by_the_rewards(tmp_path):
    rows = [{"prompt": p, "responses": ["c"]} for p in PROMPTS]
    config = sampled_config(tmp_path, rollout={"prompts": 3, "responses": 4, "source": "mixed"})
    policy = run(config, rows)
    assert_steps_by_hand(tmp_path, config, policy)
    given = [line for line in completions(tmp_path) if line["step"] == 1]
    by_group = {g: [r for r in given if r["group"] == g] for g in range(3)}
    for lines in by_group.values():
        x, last = PROMPTS.index(lines[0]["prompt"]), lines[-1]
        assert len(lines) == 5 and last["response"] == "c" and last["reward"] == REWARDS[x, 2]


def test_skipped_groups_stay_in_the_record_and_leave_the_update(tmp_path):
    flat = lambda prompts, completions: [
        0.5 if p == "p0" else r for p, r in zip(prompts, reward(prompts, completions), strict=True)
    ]
    config = sampled_config(tmp_path, rollout={"prompts": 3, "responses": 6, "equal": "skip"})
    policy = run(config, function=flat)
    assert_steps_by_hand(tmp_path, config, policy)
    record = records(tmp_path)[0]
    assert record["groups/counted"] == 3 and record["groups/left_out"] == 1 and record["responses/left_out"] == 6
    assert record["groups/all_equal"] == 1
    assert {line["prompt"] for line in completions(tmp_path) if line.get("left_out")} == {"p0"}


def test_a_step_of_equal_groups_alone_is_taken(tmp_path):
    config = sampled_config(tmp_path, rollout={"prompts": 3, "responses": 6, "equal": "skip"}, run={"steps": 1})
    run(config, function=lambda completions: [1.0] * len(completions))
    record = records(tmp_path)[0]
    assert record["groups/all_equal"] == 3 and "groups/left_out" not in record and record["gradient_norm"] >= 0


def test_redrawn_groups_come_from_further_prompts(tmp_path):
    """No prompt is drawn twice before all were: what was taken beyond the step's number moves the order on."""
    asked = []

    def noted(prompts, completions):
        asked.append([p for i, p in enumerate(prompts) if i % 2 == 0])
        return [0.0 if p == "p1" else r for p, r in zip(prompts, reward(prompts, completions), strict=True)]

    rollout = {"prompts": 2, "responses": 2, "equal": "redraw", "redraws": 2}
    config = sampled_config(tmp_path, rollout=rollout, run={"steps": 12}, data={"shuffle": False})
    run(config, function=noted)
    order = [p for call in asked for p in call]
    assert order == [PROMPTS[i % 3] for i in range(len(order))] and len(order) > 24
    assert max(r["groups/redrawn"] for r in records(tmp_path)) > 0


def test_a_curriculum_returns_to_prompts_whose_rewards_differ(tmp_path):
    """Half of each step; the other half goes through the data once, in order."""
    asked = []
    assert np.std([0.1] * 6) > 0, "equal rewards have a spread by rounding"

    def noted(prompts, completions):
        asked.append(prompts[::6])
        scale = {"p0": 0.0, "p1": 1.0, "p2": 0.0}
        return [0.1 + scale[p] * r for p, r in zip(prompts, reward(prompts, completions), strict=True)]

    data, rollout = {"curriculum": 0.5, "shuffle": False}, {"prompts": 4, "responses": 6}
    run(sampled_config(tmp_path, data=data, rollout=rollout, run={"steps": 9}), function=noted)
    revisited = [r["groups/revisited"] for r in records(tmp_path)]
    assert revisited[0] == 0 and set(revisited[1:]) == {1}, "p1 alone has rewards that differ"
    order = [p for step, n in zip(asked, revisited, strict=True) for p in step[: 4 - n]]
    assert order == [PROMPTS[i % 3] for i in range(len(order))]
    assert all(step[-1] == "p1" for step in asked[1:])


@pytest.mark.parametrize("equal", ["keep", "skip"])
def test_truncated_responses_leave_their_group(equal, tmp_path):
    class Cut(Counting):
        """Cuts every third response."""

        def generate(self, prompts, seeds, sampling):
            drawn = super().generate(prompts, seeds, sampling)
            return [[Response(r.tokens[:1], False) if i % 3 == 0 else r for i, r in enumerate(g)] for g in drawn]

    rollout = {"prompts": 3, "responses": 6, "truncated": "drop", "equal": equal}
    config = sampled_config(tmp_path, rollout=rollout)
    policy = run(config, policy=Cut(table(REFERENCE), config.optimizer, updates=config.updates))
    assert_steps_by_hand(tmp_path, config, policy)
    assert {line.get("left_out", False) for line in completions(tmp_path) if not line["finished"]} == {True}
    assert records(tmp_path)[0]["truncated"] == pytest.approx(1 / 3)


def test_a_step_of_truncated_responses_alone_says_what_to_do(tmp_path):
    config = sampled_config(tmp_path, rollout={"max_tokens": 1, "truncated": "drop"})
    with pytest.raises(
        RuntimeError, match=r"48 are left out, as cut at rollout\.max_tokens .*: raise rollout\.max_tok"
    ):
        run(config)


class Letters:
    """Decodes token i as the i-th letter, and token 0 as nothing."""

    def decode(self, tokens):
        return "".join(chr(96 + t) for t in tokens if t)


@pytest.mark.parametrize(
    ("tokens", "finished", "stop", "kept"),
    [
        ((1, 2, 3, 4, 0), True, ("bc",), (1, 2, 3)),
        ((1, 2, 3, 4), False, ("d",), (1, 2, 3, 4)),
        ((1, 2, 3, 4, 0), True, ("x", "a"), (1,)),
        ((1, 2, 3, 2, 3, 0), True, ("bc",), (1, 2, 3)),
        ((1, 2, 3, 0), True, ("z",), None),
    ],
)
def test_a_stop_text_ends_a_response(tokens, finished, stop, kept):
    given = Response(tokens, finished)
    ended = stopped(Letters(), given, stop)
    assert ended == (given if kept is None else Response(kept, True, stopped=True))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"replay": {"groups": 8}, "objective": {"name": "grpo"}},
            r"replay\.groups = 8; objective\.name = 'grpo' weighs",
        ),
        ({"data": {"recorded": "x.jsonl"}, "objective": {"name": "rloo"}}, r"data\.recorded = 'x\.jsonl'; objective"),
        (
            {"replay": {"groups": 8, "share": 0.9}},
            r"replay\.share = 0\.9; of rollout\.prompts = 4 none would be sampled",
        ),
        ({"replay": {"groups": 8, "share": 1.0}}, r"replay\.share = 1\.0; expected in \(0, 1\)"),
        ({"replay": {"groups": 8}, "rollout": {"source": "recorded"}}, r"nothing is sampled to mix it with"),
        ({"data": {"curriculum": 1.0}}, r"data\.curriculum = 1\.0; expected in \[0, 1\)"),
        ({"rollout": {"stop": ("",)}}, r"rollout\.stop = \(''\,\); expected texts that are not empty"),
        ({"model": {"template": {"tokenize": True}}}, r"model\.template .* not tokenize"),
    ],
)
def test_settings_that_cannot_be_mixed_are_refused(sections, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(sampled_config(tmp_path, **({"rollout": {"prompts": 4}} | sections)))


def test_recorded_training_data_takes_no_replay(tmp_path):
    config = config_of(tmp_path, replay={"groups": 8})
    with pytest.raises(ConfigError, match=r"replay\.groups is set, and the training data holds recorded responses"):
        train(config, policy_of(config), train_rows=groups())


def test_mixed_needs_recorded_responses_and_a_reward(recorded_file, tmp_path):
    config = sampled_config(tmp_path, rollout={"source": "mixed"})
    with pytest.raises(DataError, match=r"which rollout\.source = 'mixed' needs"):
        run(config)
    with pytest.raises(ConfigError, match="no reward"):
        train(replace(config, rewards={}), policy_of(config), train_rows=groups())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p0"}\n')
    config = sampled_config(tmp_path, data={"recorded": str(prompts)})
    with pytest.raises(DataError, match=r"data\.recorded has no recorded responses; its columns are prompt"):
        run(config)
