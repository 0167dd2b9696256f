"""Groups in several micro-batches go forward once, on one process and on ranks that hold whole groups."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch_policies
from batches import SMOOTH, batch, coefficients_of, moved, step_difference
from required import require
from torch_processes import run_processes

require(subject="torch")

import torch
import torch_group_worker as worker
from gvpo_torch import check, update

OF = batch((4, 3, 1, 5))
SMALL = {"micro_batch_tokens": 20}  # every group of several responses takes more than one micro-batch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_models.made_once(tmp_path_factory)


def layer_tokens(of_policy, call) -> tuple[int, object]:
    """Tokens that the first layer computes in `call`, those of the backward pass included, and what it returns."""
    seen = []
    layer = of_policy.scorer.decoder.layers[0]
    hook = layer.self_attn.q_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:2]))
    try:
        found = call()
    finally:
        hook.remove()
    return sum(rows * width for rows, width in seen), found


@pytest.mark.parametrize("kind", [{}, {"lora_rank": 2, "learning_rate": 3.0}], ids=["full", "lora"])
def test_no_group_is_scored_first(kind, folders) -> None:
    computed = {}
    for always in (True, False):
        for strategy in ("group", "score"):
            settings = SMOOTH | SMALL | kind | {"strategy": strategy, "gradient_checkpointing": always}
            of_policy = torch_policies.policy(folders("llama"), **settings)
            assert of_policy.defers
            count, done = layer_tokens(of_policy, lambda p=of_policy: p.update(OF, coefficients_of(OF)))
            computed[always, strategy] = count
            rows = sum(len(micro) * micro[0].length for micro in of_policy._splitting.rows(OF))
            if strategy == "score":
                assert done.tokens == 2 * rows and count == (3 if always else 2) * rows
            else:
                assert done.tokens <= 1.35 * rows  # groups are cut apart, which pads them more
    assert computed[True, "group"] < 0.9 * computed[True, "score"]  # 2 of 3 passes, of rows with more padding
    assert computed[False, "group"] < computed[False, "score"]


@pytest.mark.parametrize("family", [*tiny_models.FULL_ATTENTION, *tiny_models.OTHERS])
def test_the_step_is_that_of_two_passes(family, folders, monkeypatch) -> None:
    """Of every family that can do so; the others score first."""
    rounds = []
    plain = update.Backward.deferred
    monkeypatch.setattr(
        update.Backward,
        "deferred",
        lambda self, batch, micro, *a: rounds.append(len(micro)) or plain(self, batch, micro, *a),
    )
    step, done = moved(torch_policies, folders(family), OF, **SMALL)
    assert max(rounds) > 1, "no group took several micro-batches"
    other, two_passes = moved(torch_policies, folders(family), OF, strategy="score", **SMALL)
    assert step_difference(other, step) < 1e-5
    np.testing.assert_allclose(done.logprobs, two_passes.logprobs, rtol=0, atol=1e-4)
    assert done.gradient_norm == pytest.approx(two_passes.gradient_norm, rel=1e-5)


def test_what_is_held_is_bounded(folders, monkeypatch) -> None:
    """Of a group beyond the budget of held tokens a part is held, and the rest is scored first."""
    from gvpo_core.training.policy import base

    calls = []
    plain = update.Backward.deferred
    monkeypatch.setattr(
        update.Backward, "deferred", lambda self, batch, micro, *a: calls.append(micro) or plain(self, batch, micro, *a)
    )
    monkeypatch.setattr(base, "HELD_MICRO_BATCHES", 1.5)
    of_policy = torch_policies.policy(folders("llama"), **(SMOOTH | SMALL))
    done = of_policy.update(OF, coefficients_of(OF))
    held = [sum(len(rows) * rows[0].length for rows in micro) for micro in calls]
    assert held and max(held) <= 30
    rows = sum(len(micro) * micro[0].length for micro in of_policy._splitting.rows(OF))
    assert rows < done.tokens < 2 * rows, "all or nothing was scored first"
    step, _ = moved(torch_policies, folders("llama"), OF, **SMALL)
    other, two_passes = moved(torch_policies, folders("llama"), OF, strategy="score", **SMALL)
    assert step_difference(other, step) < 1e-5
    np.testing.assert_allclose(done.logprobs, two_passes.logprobs, rtol=0, atol=1e-4)


def test_a_model_whose_layers_cannot_be_computed_again_scores_first(folders, monkeypatch, caplog) -> None:
    plain = check._by_response
    monkeypatch.setattr(
        check,
        "_by_response",
        lambda scorer, *given: [v + (0.0 if not torch.is_grad_enabled() else 0.1) for v in plain(scorer, *given)],
    )
    with caplog.at_level("INFO", "gvpo.torch"):
        of_policy = torch_policies.policy(folders("llama"), **SMOOTH)
    assert not of_policy.defers
    assert "a group of several micro-batches is scored before its gradient is taken (log-probs with" in caplog.text


@pytest.fixture(scope="module")
def of_three(folders, tmp_path_factory) -> Path:
    """What three processes found."""
    out = tmp_path_factory.mktemp("ranks")
    run_processes(3, "torch_group_worker.py", [str(folders("llama-tied-bias")), str(out)], out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("sharding", worker.SHARDING)
@pytest.mark.parametrize("kind", worker.KINDS)
def test_ranks_with_whole_groups_take_the_step_of_one(kind, sharding, folders, of_three) -> None:
    """One rank has no group; one group is too large to be held; a rank's error is every rank's."""
    found = dict(np.load(of_three / f"{kind} {sharding}.npz"))
    settings = {**worker.SETTINGS, **worker.KINDS[kind], "strategy": "score"}
    step, done = moved(torch_policies, folders("llama-tied-bias"), worker.OF, coefficients_of(worker.OF), **settings)
    apart = step_difference(step, {n.removeprefix("moved "): v for n, v in found.items() if n.startswith("moved ")})
    assert apart < 1e-5
    np.testing.assert_allclose(found["logprobs"], done.logprobs, rtol=0, atol=1e-4)
    assert float(found["norm"]) == pytest.approx(done.gradient_norm, rel=1e-5)
