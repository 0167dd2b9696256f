"""Every quantity of the core under the name that the reference gives it, computed from a case's arrays."""

from collections.abc import Callable
from typing import Any

import gvpo_core as core

Arrays = dict[str, Any]


def everything(a: Arrays, *, beta: float, num_groups: int) -> dict[str, Any]:
    """Name -> array, for all public functions of arrays at once: one compilation covers them all."""
    scores = (a["logprobs"], a["ref_logprobs"], a["rewards"], a["group_ids"])
    options = {"num_groups": num_groups, "valid": a["valid"]}
    factors = {"response_weights": a.get("response_weights")}
    penalty = {"beta": beta, "logprobs": a["old_logprobs"], "ref_logprobs": a["ref_logprobs"]}
    out = {
        "gvpo_weights": core.gvpo_weights(*scores, beta=beta, **options, **factors),
        "gvpo_coefficients": core.gvpo_coefficients(*scores, beta=beta, **options, **factors),
        "sft_weights": core.sft_weights(a["logprobs"], valid=a["valid"]),
        "reject_sampling_weights": core.reject_sampling_weights(a["rewards"], a["group_ids"], **options),
        "dpo_weights": core.dpo_weights(*scores, beta=beta, **options),
        "dpo_loss": core.dpo_loss(*scores, beta=beta, **options),
        "bradley_terry_loss": core.bradley_terry_loss(a["rewards"], a["ref_logprobs"], valid=a["valid"]),
        "importance_ratio": core.importance_ratio(a["logprobs"], a["old_logprobs"]),
        "clipped_ratio_weights": core.clipped_ratio_weights(
            a["logprobs"], a["old_logprobs"], a["finite_rewards"], valid=a["valid"]
        ),
    }
    for name, value in core.gvpo_loss(*scores, beta=beta, **options, **factors)._asdict().items():
        out[f"gvpo_loss.{name}"] = value
    for name, value in core.gvpo_regret(*scores, beta=beta, **options, **factors)._asdict().items():
        out[f"gvpo_regret.{name}"] = value
    for name in ("grpo", "dr_grpo", "rloo"):
        weights = getattr(core, f"{name}_weights")
        out[f"{name}_weights"] = weights(a["rewards"], a["group_ids"], **options)
        out[f"{name}_weights.kl"] = weights(a["rewards"], a["group_ids"], **penalty, **options)
    for name in core.OBJECTIVES:
        out[f"objective_coefficients.{name}"] = core.objective_coefficients(
            name,
            *scores[:2],
            a["old_logprobs"],
            abs(scores[2]) if name == "maxrl" else scores[2],  # it rejects negative rewards
            scores[3],
            beta=beta,
            lengths=a["lengths"],
            **options,
            **(factors if name == "gvpo" else {}),
        )
    return out


def scalars(beta: float, num_groups: int) -> dict[str, Callable[[Any, Arrays], Any]]:
    """Name -> f(logprobs, the other arrays) -> (), what a training loop may differentiate."""

    def of(function: Callable[..., Any]) -> Callable[[Any, Arrays], Any]:
        def call(logprobs: Any, a: Arrays) -> Any:
            scores = (logprobs, a["ref_logprobs"], a["rewards"], a["group_ids"])
            options = {} if function is core.dpo_loss else {"response_weights": a.get("response_weights")}
            return function(*scores, beta=beta, num_groups=num_groups, valid=a["valid"], **options)

        return call

    loss, regret, weights = of(core.gvpo_loss), of(core.gvpo_regret), of(core.gvpo_weights)
    return {
        "gvpo_loss": lambda x, a: loss(x, a).loss,
        "gvpo_surrogate": of(core.gvpo_surrogate),
        "gvpo_regret.second_order": lambda x, a: regret(x, a).second_order,
        "gvpo_regret.series": lambda x, a: regret(x, a).series,
        "dpo_loss": of(core.dpo_loss),
        "importance_ratio": lambda x, a: core.importance_ratio(x, a["old_logprobs"]).sum(),
        "weights are constants": lambda x, a: (weights(x, a) ** 2).sum(),
    }
