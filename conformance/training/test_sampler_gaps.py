"""The check that a sampler has the policy's weights: what stops a run, and what never does, with simulated rounding."""

import json

import numpy as np
import pytest

from gvpo_core.training.samplers import SamplerError
from gvpo_core.training.samplers.gaps import MOST, SMALL, GapCheck

pytestmark = pytest.mark.core


def drawn(random, *, count=128, tokens=(20, 60), noise=0.0, bias=0.0):
    """(sampler's, policy's, lengths): rounding of each token with this deviation, and this much more a token."""
    lengths = random.integers(*tokens, count)
    policy = -random.uniform(0.5, 1.5, count) * lengths
    apart = np.asarray([random.normal(0, noise, n).sum() for n in lengths]) + bias * lengths
    return policy + apart, policy, lengths, np.zeros(count)


def checked(check, *step):
    check.check(*step)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 2e-5), ("bfloat16", 0.02), ("bfloat16", 0.1)])
def test_rounding_alone_never_stops_a_run(dtype, noise):
    """2,000 steps, also where the responses become ten times shorter or longer, or a router sends a few elsewhere."""
    for seed, later in enumerate([(20, 60), (2, 6), (200, 600)]):
        random = np.random.default_rng(seed)
        check = GapCheck(None, 1, dtype)
        checked(check, *drawn(random, noise=noise))
        for _ in range(600):
            theirs, ours, lengths, stale = drawn(random, noise=noise, tokens=later, count=32)
            theirs[0] += 40 * noise
            checked(check, theirs, ours, lengths, stale)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_old_weights_are_found_in_both_precisions(dtype, noise):
    """0.025 nats a token apart."""
    random = np.random.default_rng(1)
    check = GapCheck(None, 1, dtype)
    for _ in range(20):
        checked(check, *drawn(random, noise=noise))
    with pytest.raises(SamplerError, match=r"differ by 0\.02\d* nats a token on average.*in the first step compared"):
        checked(check, *drawn(random, noise=noise, bias=0.025))


def test_where_both_compute_in_float32_the_first_step_is_checked_too():
    random = np.random.default_rng(2)
    step = drawn(random, noise=1e-5, bias=0.002)
    checked(GapCheck(None, 1, "float32"), *step)  # the server may compute in 16 bits
    with pytest.raises(
        SamplerError, match=rf"at most {SMALL:g} is expected \(both compute in float32; else set engine.dtype\)"
    ):
        checked(GapCheck(None, 1, "float32", "float32"), *step)


def test_no_precision_explains_another_model():
    with pytest.raises(SamplerError, match=rf"at most {MOST:g} is expected"):
        checked(GapCheck(None, 1, "bfloat16"), *drawn(np.random.default_rng(3), bias=0.3))


def test_a_few_responses_are_no_mean():
    random = np.random.default_rng(4)
    check = GapCheck(None, 1, "bfloat16")
    checked(check, *drawn(random, noise=0.01))
    checked(check, *drawn(random, count=2, bias=0.1))
    with pytest.raises(SamplerError):
        checked(check, *drawn(random, count=16, bias=0.1))


def test_responses_of_older_weights_are_not_compared():
    random = np.random.default_rng(5)
    check = GapCheck(None, 1, "float32", "float32")
    theirs, ours, lengths, stale = drawn(random, bias=0.1)
    checked(check, theirs, ours, lengths, stale + 1)
    checked(check, theirs, ours, lengths, np.full(len(stale), np.nan))
    checked(check, theirs, ours, lengths, None)
    assert check.usual is None


def test_the_first_comparison_survives_a_checkpoint():
    random = np.random.default_rng(6)
    check, again = GapCheck(None, 1, "float32"), GapCheck(None, 1, "float32")
    checked(check, *drawn(random, noise=1e-5))
    again.restore(json.loads(json.dumps(check.state())))
    assert again.usual == check.usual
    with pytest.raises(SamplerError, match="in the first step compared"):
        checked(again, *drawn(random, bias=0.01))
    again.restore({})
    assert again.usual is None


def test_a_run_resumes_with_its_first_comparison(tmp_path, capsys):
    from sampler_runs import Copy, run, short

    run(short(tmp_path, 2), Copy())
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "source.json").read_text())
    assert state["gap"]["count"] > 4 and max(state["gap"]["means"]) < 1e-9
