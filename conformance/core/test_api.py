"""The public names of the core, their signatures and their documentation."""

import inspect

import pytest

import gvpo_core

pytestmark = pytest.mark.core

SCORES = "logprobs, ref_logprobs, rewards, group_ids, *, beta, num_groups=None, valid=None"
WEIGHTED = f"{SCORES}, response_weights=None"
PENALTY = "rewards, group_ids, *, beta=0.0, logprobs=None, ref_logprobs=None"
SIGNATURES = {
    "bradley_terry_loss": "chosen_rewards, rejected_rewards, *, valid=None",
    "clipped_ratio_weights": "logprobs, old_logprobs, advantages, *, clip=0.2, valid=None",
    "dense_group_ids": "labels",
    "dpo_loss": SCORES,
    "dpo_weights": SCORES,
    "dr_grpo_weights": f"{PENALTY}, num_groups=None, valid=None",
    "grpo_weights": f"{PENALTY}, ddof=1, eps=0.0001, num_groups=None, valid=None",
    "gvpo_coefficients": WEIGHTED,
    "gvpo_loss": WEIGHTED,
    "gvpo_regret": WEIGHTED,
    "gvpo_surrogate": WEIGHTED,
    "gvpo_weights": WEIGHTED,
    "importance_ratio": "logprobs, old_logprobs",
    "objective_coefficients": "name, logprobs, ref_logprobs, old_logprobs, rewards, group_ids, *, beta, "
    "num_groups=None, valid=None, clip=0.2, response_weights=None, lengths=None",
    "reject_sampling_weights": "rewards, group_ids, *, num_groups=None, valid=None",
    "rloo_weights": f"{PENALTY}, num_groups=None, valid=None",
    "sequence_logprobs": "token_logprobs, mask",
    "sft_weights": "logprobs, *, valid=None",
}


def test_public_names() -> None:
    others = {"GVPOLoss", "GVPORegret", "OBJECTIVES"}
    assert set(gvpo_core.__all__) == set(SIGNATURES) | others
    assert all(hasattr(gvpo_core, name) for name in gvpo_core.__all__)
    assert gvpo_core.OBJECTIVES == (
        "gvpo", "trajectory_balance", "rebel", "mirror_descent", "a_star_po", "grpo", "dr_grpo", "rloo", "gspo",
        "maxrl", "reject_sampling", "sft", "dpo",
    )  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    signature = inspect.signature(getattr(gvpo_core, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_documentation(name: str) -> None:
    text = inspect.getdoc(getattr(gvpo_core, name))
    assert text is not None
    assert text.splitlines()[0].endswith("."), "the first line is one sentence"
    for section in ("Args", "Returns", "Raises"):
        assert f"\n{section}:" in text, f"{name}: no {section}"
    if name != "dense_group_ids":
        assert "\nReference:" in text, f"{name}: no Reference"
