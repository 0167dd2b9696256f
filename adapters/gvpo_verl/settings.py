"""The settings of verl under which a step is GVPO's, checked when the trainer starts."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from packaging.version import Version

TRIED = ("0.9", "0.10")  # from, below


class Rule(NamedTuple):
    """A setting's path, when it fits, what to set, and why."""

    path: str
    fits: Callable[[Any], bool]
    wanted: str
    reason: str


def _is_beta(given: Any) -> bool:
    return isinstance(given, int | float) and 0 <= given < float("inf")


def _in(*values: Any) -> Callable[[Any], bool]:
    return lambda given: any(given == value for value in values)


_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_RATIO = "GVPO takes samples from anywhere without importance weights (Cor. 3.2)"
_OTHER = "it adds a gradient of its own"
_CUT = "it leaves responses out of the samples that Cor. 3.2 needs"

RULES = (
    Rule("trainer.use_v1", _in(True), "True", "the trainer gvpo is one of verl's v1 trainers"),
    Rule("algorithm.adv_estimator", _in("rloo"), "rloo", "it needs no critic; its values are replaced by GVPO's"),
    Rule("algorithm.kl_ctrl.type", _in("fixed"), "fixed", "kl_coef is GVPO's beta, a constant"),
    Rule("algorithm.kl_ctrl.kl_coef", _is_beta, "a finite number of at least 0", "it is GVPO's beta"),
    Rule("algorithm.rollout_correction.rollout_is", _in(None), "null", _RATIO),
    Rule("algorithm.rollout_correction.rollout_rs", _in(None), "null", "rejected tokens leave a response's sum"),
    Rule("algorithm.rollout_correction.bypass_mode", _in(None, False), "false", "weights need the policy's scores"),
    Rule("algorithm.filter_groups.enable", _in(None, False), "false", "groups with equal rewards count through beta"),
    Rule(f"{_ACTOR}.strategy", _in("fsdp", "fsdp2"), "fsdp or fsdp2", "other engines were not tried"),
    Rule(f"{_ACTOR}.policy_loss.loss_mode", _in("gpg"), "gpg", "the others have a ratio and clip it"),
    Rule(f"{_ACTOR}.loss_agg_mode", _in("seq-mean-token-sum"), "seq-mean-token-sum", "the others divide by tokens"),
    Rule(f"{_ACTOR}.use_kl_loss", _in(False), "false", _OTHER),
    Rule(f"{_ACTOR}.entropy_coeff", _in(0), "0", _OTHER),
    Rule(f"{_ACTOR}.shuffle", _in(False), "false", "it would cut groups between mini-batches"),
    Rule("distillation.enabled", _in(None, False), "false", _OTHER),
    Rule(f"{_ROLLOUT}.temperature", _in(1), "1.0", "verl scores at the temperature it samples at; GVPO scores at 1"),
    Rule(f"{_ROLLOUT}.top_p", _in(1), "1.0", _CUT),
    Rule(f"{_ROLLOUT}.top_k", _in(-1, 0, None), "-1", _CUT),
)


def check_settings(config: Mapping[str, Any]) -> float:
    """GVPO's beta, from verl's whole configuration.

    Raises: ValueError: naming every setting under which a step would not be GVPO's, and what to set.
    """
    wrong = [
        f"{rule.path} is {value!r}; set it to {rule.wanted}: {rule.reason}"
        for rule in RULES
        if not rule.fits(value := _at(config, rule.path))
    ]
    beta = _at(config, "algorithm.kl_ctrl.kl_coef")
    if _is_beta(beta) and beta > 0 and not _at(config, "algorithm.use_kl_in_reward"):
        wrong.append(
            f"algorithm.use_kl_in_reward is False and algorithm.kl_ctrl.kl_coef, GVPO's beta, is {beta}; set the first"
            " to True, which brings the reference policy, or the second to 0"
        )
    if wrong:
        raise ValueError("verl cannot train with exact GVPO under these settings:\n" + "\n".join(wrong))
    return float(beta)


def check_version(found: str | None = None) -> None:
    """Raises: RuntimeError: a verl that this adapter was not tried with."""
    found, (low, high) = found or version("verl"), TRIED
    if not Version(low) <= Version(found) < Version(high):
        raise RuntimeError(
            f"verl {found} is installed; gvpo_verl was tried with >={low},<{high} and overrides methods that others"
            f' may not have: pip install "verl>={low},<{high}"'
        )


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = None if config is None else config.get(name)
    return config
