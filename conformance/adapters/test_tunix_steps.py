"""GVPO through Tunix's own GRPOLearner: its steps are the whole batch's, and the reward rises."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from required import require

require("tunix", subject="tunix")

import jax
import optax
import tunix_runs as runs

pytestmark = pytest.mark.filterwarnings("default")  # Tunix and flax warn about themselves

K, BETA = 3, 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return runs.write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("training", "shuffle", "beta"),
    [
        ({}, None, 0.0),
        ({"mini_batch_size": 4, "train_micro_batch_size": 1}, 3, BETA),
        ({"mini_batch_size": 4, "train_micro_batch_size": 2, "rollout_micro_batch_size": 4}, 5, BETA),
    ],
    ids=["one-micro-batch-beta-0", "four-shuffled", "two-of-one-rollout"],
)
def test_a_step_is_the_whole_batchs(training, shuffle, beta, folder):
    """At sampling temperature 1.3, from a policy that has moved from the reference."""
    ran = runs.run(folder, k=K, beta=beta, training=training, shuffle=shuffle)
    assert sum(len(rollout.responses) for rollout in ran.rollouts) == 12
    expected = runs.whole_step(folder, ran.before, ran.rollouts, k=K, beta=beta)
    assert runs.apart(ran.after, expected, ran.before) < 1e-5


def test_a_step_of_lora_is_the_whole_batchs(folder):
    """Adapters that have moved; the reference is the model without them."""
    training = {"mini_batch_size": 4, "train_micro_batch_size": 2}
    ran = runs.run(folder, k=K, beta=BETA, training=training, lora=True)
    expected = runs.whole_step(folder, ran.before, ran.rollouts, k=K, beta=BETA, lora=True)
    assert runs.apart(ran.after, expected, ran.before) < 1e-5


def test_missing_scores_leave_their_groups(folder):
    """One group with a response less, one with a single score: it does not count, in a micro-batch of its own too."""

    def reward(prompts, completions, **_):
        scores = runs.vowels(prompts, completions)
        unscored = {"say bee:": 1, "e": 2}
        for prompt, count in unscored.items():
            places = [i for i, p in enumerate(prompts) if p == prompt]
            for i in places[:count]:
                scores[i] = None
        return scores

    training = {"mini_batch_size": 4, "train_micro_batch_size": 1}
    ran = runs.run(folder, k=K, beta=BETA, training=training, reward=reward)
    assert sum(np.isnan(rollout.rewards).sum() for rollout in ran.rollouts) == 3
    expected = runs.whole_step(folder, ran.before, ran.rollouts, k=K, beta=BETA)
    assert runs.apart(ran.after, expected, ran.before) < 1e-5


def test_several_mini_batches_and_iterations(folder):
    """Two mini-batches a batch and two steps on each: four steps, each exact from where the last ended."""
    training = {"mini_batch_size": 2, "train_micro_batch_size": 1, "max_steps": 4}
    ran = runs.run(folder, k=K, beta=BETA, iterations=2, training=training, shuffle=1)
    half = len(ran.rollouts) // 2
    at = ran.before
    for rollouts in (ran.rollouts[:half], ran.rollouts[half:]):
        for _ in range(2):
            at = runs.whole_step(folder, at, rollouts, k=K, beta=BETA)
    assert runs.apart(ran.after, at, ran.before) < 1e-5


def test_two_devices_take_the_same_steps():
    """The first test again, with the rows of each micro-batch sharded over two devices."""
    if jax.device_count() > 1:
        pytest.skip("this is the process with two devices")
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    case = "test_a_step_is_the_whole_batchs[two-of-one-rollout]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{case}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_the_reward_rises(folder):
    training = {"mini_batch_size": 2, "max_steps": 15}
    ran = runs.run(
        folder,
        k=8,
        beta=0.02,
        batches=15,
        optimizer=optax.adam(1e-2),
        prompts=("say a:", "say bee:"),
        training=training,
    )
    rewards = [np.mean(rollout.rewards) for rollout in ran.rollouts]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
