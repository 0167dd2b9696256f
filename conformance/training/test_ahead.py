"""rollout.ahead: responses drawn up to n steps before they are used, while the policy is updated."""

import json
import os
import signal
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import table_run
from engine_server import Sent, Server
from killing import Forked, lasting
from sampler_runs import Copy, lines, run, short
from table_problem import PROMPTS, REFERENCE, reward, settings, table

from gvpo_core.training.cli import main
from gvpo_core.training.config import ConfigError
from gvpo_core.training.config.file import read_config
from gvpo_core.training.data import Prompts
from gvpo_core.training.loop import train
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.rollout import requests_of
from gvpo_core.training.samplers import Drawn, Engine, SamplerError, Text, gaps
from gvpo_core.training.samplers.background import InBackground
from gvpo_core.training.sampling import Sampling
from gvpo_core.training.sources import Ahead

pytestmark = pytest.mark.core

ROWS = [{"prompt": p} for p in PROMPTS]


def early(folder, steps, ahead, *, every=0):
    config = short(folder, steps)
    config = replace(config, run=replace(config.run, checkpoint_every=every))
    return replace(config, rollout=replace(config.rollout, ahead=ahead))


def engine(server, **options):
    return Engine(server.url, "tiny", pause=0.001, **options)


def sending(server, folder, weights="adapters"):
    return engine(server, weights=weights, folder=folder, gap_tolerance=1e-9)


def trained(config):
    return [record for record in lines(config, "metrics") if record["kind"] == "train"]


@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
def test_the_weights_are_as_many_steps_old_as_asked_for(ahead, tmp_path, capsys):
    config = early(tmp_path / "run", 5, ahead)
    with Server() as server:
        run(config, sending(server, tmp_path / "weights"), Sent(table(REFERENCE), config.optimizer))
    ages = [min(ahead, step) for step in range(5)]
    assert [record["sampler/staleness"] for record in trained(config)] == ages
    assert [record["sampler/staleness/max"] for record in trained(config)] == ages
    drawn = [c for c in lines(config, "completions") if c["kind"] == "train"]
    assert {(c["step"], c["version"]) for c in drawn} == {(t, max(0, t - 1 - ahead)) for t in range(1, 6)}
    assert not [a for record in trained(config) for a in record["alerts"] if a["key"] == "staleness"]
    assert [record["responses/lost"] for record in trained(config)] == [0] * 5


def test_with_constant_weights_the_run_is_that_of_ahead_0(tmp_path, capsys):
    """The same requests, each once, and the same steps: nothing is used twice or lost."""
    tables, asked = [], []
    for ahead in (0, 3):
        config = early(tmp_path / str(ahead), 6, ahead)
        policy = TablePolicy(table(REFERENCE), config.optimizer)
        with Server() as server:
            run(config, engine(server), policy)
            asked.append(Counter((body["prompt"][0], body["seed"], body["n"]) for body in server.asked))
        tables.append(policy.log_table())
    assert np.array_equal(*tables)
    assert asked[0] == asked[1] and set(asked[0].values()) == {1}
    responses = [[(c["step"], c["response"]) for c in lines(early(tmp_path / a, 6, 0), "completions")] for a in "03"]
    assert responses[0] == responses[1]


def test_the_whole_model_is_sent_when_no_request_is_in_flight(tmp_path, capsys):
    config = early(tmp_path / "run", 4, 2)
    with Server() as server:
        server.delay = 0.02
        sampler = sending(server, tmp_path / "weights", "model")
        run(config, sampler, Sent(table(REFERENCE), config.optimizer))
        assert server.at_reload == [0] * 4
    assert [record["sampler/staleness"] for record in trained(config)] == [0, 1, 2, 2]


class Swapped(Copy):
    """Has the policy's weights at first; from `at` on another model, under the policy's version."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    @property
    def version(self):
        return self.versions[-1]

    def refresh(self, policy, version):
        super().refresh(policy, version)
        if version >= self.at:
            self.copy = TablePolicy(table(np.full((3, 5), 0.01) + np.eye(3, 5) * 0.95))


class OneApart(Swapped):
    """Has the policy's weights; the first response of each prompt has a token whose probability was rounded far off."""

    def generate(self, prompts, seeds, sampling):
        drawn = super().generate(prompts, seeds, sampling)
        return [[replace(r, logprob=r.logprob + 0.5 * len(r.tokens) * (not i)) for i, r in enumerate(m)] for m in drawn]


def test_one_response_that_is_apart_does_not_stop_a_run(tmp_path, capsys, monkeypatch):
    """A router of experts in 16 bits may send a token elsewhere: several responses are compared."""
    monkeypatch.setattr(gaps, "PROBE_EVERY", 3)
    config = early(tmp_path / "run", 5, 2)
    run(config, OneApart(at=99))
    assert len(trained(config)) == 5 and config.rollout.responses > 2


def test_another_model_under_the_present_version_is_found_now_and_then(tmp_path, capsys, monkeypatch):
    """Without a tolerance, and though the responses of a step are of older weights."""
    monkeypatch.setattr(gaps, "PROBE_EVERY", 3)
    with pytest.raises(SamplerError, match="says that it has the policy's weights"):
        run(early(tmp_path / "run", 8, 2), Swapped(at=2))
    assert len(trained(early(tmp_path / "run", 8, 2))) == 3  # compared before steps 1 and 4


class Meets(Copy):
    """Draws from step 2 on only while the update of the step before is under way."""

    def __init__(self):
        super().__init__()
        self.drawing, self.updating, self.drawn = threading.Event(), threading.Event(), 0

    def generate(self, prompts, seeds, sampling):
        self.drawn += 1
        if self.drawn > 1:
            assert self.updating.wait(60)
            self.drawing.set()
        return super().generate(prompts, seeds, sampling)


class Waits(TablePolicy):
    """Its first update ends once the sampler draws the next step."""

    def update(self, batch, coefficients, *, scored=None):
        if not self.update_count:
            self.sampler.updating.set()
            assert self.sampler.drawing.wait(60), "nothing is drawn while the policy is updated"
        return super().update(batch, coefficients, scored=scored)


def test_the_next_step_is_drawn_while_the_policy_is_updated(tmp_path, capsys):
    config, sampler = early(tmp_path, 3, 1), Meets()
    policy = Waits(table(REFERENCE), config.optimizer)
    policy.sampler = sampler
    run(config, sampler, policy)
    assert sampler.drawn == 3 and sampler.closed == 1


SAMPLER = """
import json
import numpy as np
from gvpo_core.training.policy import Batch
from gvpo_core.training.policy.table import TablePolicy
from gvpo_core.training.samplers import Drawn

class Copy:
    def refresh(self, policy, version):
        names = policy.prompts, policy.responses
        self.version = version
        self.copy = TablePolicy({p: dict(zip(names[1], row)) for p, row in zip(names[0], np.exp(policy.log_table()))})

    def generate(self, prompts, seeds, sampling):
        drawn = self.copy.generate(prompts, seeds, sampling)
        return [[Drawn(r.tokens, r.finished, -1.0, self.version) for r in many] for many in drawn]
"""
REWARD = '''
import os
import signal
from pathlib import Path

calls = 0

def reward(completions, answer):
    """Kills the run at its Nth call, the first time."""
    global calls
    calls += 1
    kill, marker = int(Path("{folder}/kill.txt").read_text()), "{folder}/killed"
    if calls == kill and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(c == a) for c, a in zip(completions, answer)]
'''


def on_disk(folder: Path, kill: int) -> Path:
    own = f'function = "{folder}/reward.py:reward"\nisolation = "thread"'
    config = table_run.make(folder, steps=8, reward=own)
    text = config.read_text().replace("[rollout]", f'[rollout]\nsampler = "{folder}/early.py:Copy"\nahead = 2')
    config.write_text(text.replace(f'evaluation = "{folder / "train.jsonl"}"', "").replace("every = 3", ""))
    (folder / "early.py").write_text(SAMPLER)
    (folder / "reward.py").write_text(REWARD.format(folder=folder))
    (folder / "kill.txt").write_text(str(kill))
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead") / "whole"
    assert main(["train", str(on_disk(folder, 0))]) == 0
    return folder


@pytest.mark.parametrize("kill", [1, 3, 4, 6])
def test_a_run_that_is_killed_repeats_the_steps_with_what_it_had_drawn(kill, whole, tmp_path):
    """A checkpoint every two steps. At the kill the next two steps are drawn, or under way."""
    launch = Forked.of()
    config, log = on_disk(tmp_path, kill), tmp_path / "log.txt"
    for wanted in (-signal.SIGKILL, 0):
        process = launch(config, log)
        process.process.join(120)
        assert process.exit_status() == wanted, log.read_text()
    assert lasting(tmp_path / "run") == lasting(whole / "run")
    ages = [r["sampler/staleness"] for r in lasting(tmp_path / "run") if r["kind"] == "train"]
    assert ages == [0, 1, 2, 2, 2, 2, 2, 2]
    drawn = [
        [(c["step"], c["row"], c["response"], c["version"]) for c in lines(settings(folder / "run"), "completions")]
        for folder in (tmp_path, whole)
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_a_signal_stopped_repeats_the_steps(stop, tmp_path, capsys):
    """An engine that gets the weights of each step: those of the queue are gone when the run resumes."""
    tables = []
    for name, at in (("whole", 0), ("parts", stop)):
        config, calls = early(tmp_path / name, 6, 2), []

        def stops(prompts, completions, at=at, calls=calls):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return reward(prompts, completions)

        with Server() as server:
            for _ in range(2 if at else 1):
                policy = Sent(table(REFERENCE), config.optimizer)
                sampler = sending(server, tmp_path / f"{name}-weights")
                result = train(config, policy, train_rows=ROWS, rewards={"value": stops}, sampler=sampler)
                assert result.exit_status in (0, 143)
        tables.append(policy.log_table())
    assert np.array_equal(*tables)
    assert lasting(tmp_path / "whole") == lasting(tmp_path / "parts")


def test_more_steps_than_the_run_had_are_other_settings(tmp_path, capsys):
    run(early(tmp_path, 2, 1), Copy())
    with pytest.raises(ConfigError, match=r"run\.steps: 2 -> 3"):
        run(early(tmp_path, 3, 1), Copy())


def test_a_queue_of_two_ranks_is_taken_up_by_one():
    """Groups that lie on both ranks: each response is there once, and in its group."""
    prompts = Prompts(list(PROMPTS), [(0,), (1,), (2,)], [{}] * 3)
    sampling, states, given = Sampling(2), [], []

    def asks(policy):
        return lambda step: requests_of(policy, prompts, [0, 1, 2], 5, (7, step))

    def work(policy):
        sampler = InBackground(TablePolicy(table(REFERENCE)))
        queue = Ahead(sampler, 1, 9)
        first = queue.ready(policy, 1, asks(policy), sampling).generate([], [], sampling)
        states.append((policy.rank, json.loads(json.dumps(queue.state()))))
        again = queue.ready(policy, 2, asks(policy), sampling).generate([], [], sampling)
        given.append((policy.rank, [r for many in again for r in many]))
        assert sum(map(len, first)) in (7, 8)

    ranks.run_ranks(2, work, table(REFERENCE), settings(Path("x")).optimizer)
    (_, state), (_, other) = sorted(states, key=lambda pair: pair[0])
    assert state == other
    one = TablePolicy(table(REFERENCE))
    queue = Ahead(InBackground(TablePolicy(table(np.roll(REFERENCE, 1, axis=1)))), 1, 9)  # draws otherwise
    queue.restore(state)
    (taken,) = [queue.ready(one, 2, asks(one), sampling).generate([], [], sampling)]
    assert [r for many in taken for r in many] == [r for _, own in sorted(given) for r in own]
    assert [len(many) for many in taken] == [5, 5, 5]


@pytest.mark.parametrize(
    "response",
    [Drawn((1, 0), True, -2.5, 3), Drawn((1,), False, float("nan"), None, mask=(True,)), Text("ü", True, 2, 5)],
)
def test_a_checkpoint_holds_a_response_as_it_was(response):
    class One:
        def generate(self, prompts, seeds, sampling):
            return [[response]]

    policy, prompts = TablePolicy(table(REFERENCE)), Prompts(list(PROMPTS[:1]), [(0,)], [{}])
    asks = lambda step: requests_of(policy, prompts, [0], 1, (step,))
    queue, other = (Ahead(InBackground(One()), 1, 5) for _ in range(2))
    queue.ready(policy, 1, asks, Sampling(2))
    other.restore(json.loads(json.dumps(queue.state())))
    assert repr(other.ready(policy, 2, asks, Sampling(2)).generate([], [], Sampling(2))) == repr([[response]])


def test_old_weights_are_found_by_a_response_of_its_own(tmp_path, capsys):
    with pytest.raises(SamplerError, match="log-probabilities differ from the policy's"):
        run(early(tmp_path / "old", 4, 2), Copy(refreshed=False, tolerance=1e-6))
    run(early(tmp_path / "new", 4, 2), Copy(tolerance=1e-9))


def test_the_rollouts_sampler_evaluates_beside_the_queue(tmp_path, capsys):
    config = early(tmp_path, 3, 2)
    config = replace(config, evaluation=replace(config.evaluation, sampler="rollout"))
    policy, sampler = TablePolicy(table(REFERENCE), config.optimizer), Copy()
    train(config, policy, train_rows=ROWS, evaluation_rows=ROWS, rewards={"value": reward}, sampler=sampler)
    assert sampler.versions == [0, 0, 1, 2, 3]
    assert [record["sampler/staleness"] for record in trained(config)] == [0, 1, 2]


def test_a_policy_given_in_python_as_its_own_sampler_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"rollout\.ahead = 1 without a sampler needs a copy of the policy"):
        run(early(tmp_path / "run", 2, 1), None)


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ('sampler = "a.py:S"\nahead = -1', "rollout.ahead = -1; expected 0 to 1000"),
        ('sampler = "a.py:S"\nahead = 1\nequal = "redraw"', "which prompts come next is not known ahead"),
        ('ahead = 1\nsource = "recorded"', "rollout.source = 'recorded' draws nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(lines, wanted, tmp_path):
    config = table_run.make(tmp_path)
    config.write_text(config.read_text().replace("[rollout]", f"[rollout]\n{lines}"))
    with pytest.raises(ConfigError, match=wanted):
        read_config(config)


def test_a_dry_run_draws_its_two_prompts_alone(tmp_path, capsys):
    config = on_disk(tmp_path, 0)
    assert main(["train", str(config), "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "nothing was written" in output and not (tmp_path / "run").exists()
