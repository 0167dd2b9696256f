"""rollout.own_responses: a sampler's responses and the policy's own in the same group."""

import json
from dataclasses import replace

import numpy as np
import pytest
import ranks
import table_run
from engine_server import Sent, Server
from sampler_runs import Copy, lines, run, short
from table_problem import PROMPTS, REFERENCE, RESPONSES, reward, settings, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import ConfigError
from gvpo_core.training.config.file import read_config
from gvpo_core.training.loop import train
from gvpo_core.training.policy import Response
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Engine

pytestmark = pytest.mark.core
ROWS = [{"prompt": p} for p in PROMPTS]


OWN = """
class Sampler:
    def __init__(self, policy):
        self.policy = policy

    def generate(self, prompts, seeds, sampling):
        return self.policy.generate(prompts, seeds, sampling)
"""


class Teacher:
    """Draws the last response, whatever the policy."""

    def generate(self, prompts, seeds, sampling):
        ids = TablePolicy(table(REFERENCE)).encode_responses("", [RESPONSES[-1]], [True])[0].tokens
        return [[Response(ids, True) for _ in row] for row in seeds]


def mixed(folder, steps=4, *, own=5, responses=8, ahead=0, every=0):
    config = short(folder, steps)
    config = replace(config, run=replace(config.run, checkpoint_every=every))
    return replace(config, rollout=replace(config.rollout, responses=responses, own_responses=own, ahead=ahead))


def drawn(config):
    return [c for c in lines(config, "completions") if c["kind"] == "train"]


def test_each_group_has_both_and_the_policys_are_those_that_count_as_drawn(tmp_path, capsys):
    config = mixed(tmp_path)
    run(config, Teacher())
    by_group = {}
    for c in drawn(config):
        by_group.setdefault((c["step"], c["group"]), []).append(c["response"])
    assert len(by_group) == 4 * 3 and {len(group) for group in by_group.values()} == {8}
    assert all(group[5:] == [RESPONSES[-1]] * 3 for group in by_group.values())
    assert any(response != RESPONSES[-1] for group in by_group.values() for response in group[:5])
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert all({"kl", "nll", "log_ratio"} <= m.keys() and m["responses/total"] == 24 for m in metrics)
    assert "8 responses (5 the policy's own)" in " ".join(capsys.readouterr().out.split())


def test_a_run_resumes_bit_for_bit(tmp_path, capsys):
    tables = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for steps in stops:
            config = mixed(tmp_path / name, 4)
            policy = TablePolicy(table(REFERENCE), config.optimizer)
            allowed = replace(config.run, steps=steps, allow_changes=True)
            run(replace(config, run=allowed), Copy(), policy)
        tables.append(policy.log_table())
    assert np.array_equal(*tables)


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_engine_beside_the_policy_is_compared_by_its_own_responses(ahead, tmp_path, capsys):
    config = mixed(tmp_path / "run", ahead=ahead)
    with Server() as server:
        sampler = Engine(
            server.url, "tiny", weights="adapters", folder=tmp_path / "weights", gap_tolerance=1e-9, pause=0.001
        )
        run(config, sampler, Sent(table(REFERENCE), config.optimizer))
        assert {body["n"] for body in server.asked} <= {3, 1}
    first = [c.get("version") for c in drawn(config) if (c["step"], c["group"]) == (1, 0)]
    assert first == [None] * 5 + [0] * 3


def test_what_the_sampler_loses_leaves_the_policys_own(tmp_path, capsys):
    config = mixed(tmp_path)
    run(config, Copy(drop=1))
    metrics = [m for m in lines(config, "metrics") if m["kind"] == "train"]
    assert [m["responses/lost"] for m in metrics] == [3] * 4 and metrics[0]["responses/total"] == 21


def test_ranks_change_nothing(tmp_path, capsys):
    tables = []
    for size in (1, 2):
        config = settings(tmp_path / str(size))
        config = replace(config, run=replace(config.run, steps=2))
        config = replace(config, rollout=replace(config.rollout, prompts=2, responses=8, own_responses=4))

        def work(policy, config=config):
            sampler = TablePolicy(table(REFERENCE))
            train(config, policy, train_rows=ROWS, rewards={"value": reward}, sampler=sampler)

        tables.append(ranks.run_ranks(size, work, table(REFERENCE), config.optimizer)[0].log_table())
    np.testing.assert_allclose(*tables, rtol=1e-12)


def test_a_collection_keeps_both_in_one_group(tmp_path, capsys):
    config = table_run.make(tmp_path, steps=2)
    (tmp_path / "own.py").write_text(OWN)
    options = ["--rollout.sampler", f"{tmp_path}/own.py:Sampler", "--rollout.own_responses", "4"]
    assert main(["collect", str(config), str(tmp_path / "out.jsonl"), *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [len(row["responses"]) for row in rows] == [6] * 4 and all(row["prompt"] for row in rows)


@pytest.mark.parametrize(
    ("lines_of", "wanted"),
    [
        ('sampler = "a.py:S"\nown_responses = 6', "rollout.own_responses = 6; expected 0 to 5"),
        ('sampler = "a.py:S"\nown_responses = -1', "rollout.own_responses = -1; expected 0 to 5"),
        ('source = "recorded"\nown_responses = 1', "rollout.source = 'recorded' draws nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(lines_of, wanted, tmp_path):
    config = table_run.make(tmp_path)
    config.write_text(config.read_text().replace("[rollout]", f"[rollout]\n{lines_of}"))
    with pytest.raises(ConfigError, match=wanted):
        read_config(config)


def test_without_a_sampler_it_is_refused(tmp_path, capsys):
    config = table_run.make(tmp_path, steps=2)
    assert main(["train", str(config), "--rollout.own_responses", "2"]) == 2
    assert "the policy draws all responses itself" in capsys.readouterr().err
