"""The verl settings that GVPO needs, checked when the trainer starts."""

from collections.abc import Mapping
from typing import Any

from gvpo_core.hosts import Rule, SettingsError, equals, is_beta, is_number, refused

_ACTOR, _ROLLOUT, _MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
_RATIO = "GVPO takes samples from anywhere without importance weights (Cor. 3.2)"
_OTHER = "it adds another gradient"
_CUT = "it excludes responses that Cor. 3.2 needs"

RULES = (
    Rule("trainer.use_v1", equals(True), "True", "the trainer gvpo is one of verl's v1 trainers"),
    Rule("algorithm.adv_estimator", equals("rloo"), "rloo", "it needs no critic; its values are replaced by GVPO's"),
    Rule("algorithm.kl_ctrl.type", equals("fixed"), "fixed", "kl_coef is GVPO's beta, a constant"),
    Rule("algorithm.kl_ctrl.kl_coef", is_beta, "a finite number of at least 0", "it is GVPO's beta"),
    Rule("algorithm.rollout_correction.rollout_is", equals(None), "null", _RATIO),
    Rule("algorithm.rollout_correction.rollout_rs", equals(None), "null", "rejected tokens leave a response's sum"),
    Rule("algorithm.rollout_correction.bypass_mode", equals(None, False), "false", "weights need the policy's scores"),
    Rule(
        "algorithm.filter_groups.enable", equals(None, False), "false", "groups with equal rewards count through beta"
    ),
    Rule(f"{_ACTOR}.strategy", equals("fsdp", "fsdp2"), "fsdp or fsdp2", "other engines were not tried"),
    Rule(f"{_ACTOR}.policy_loss.loss_mode", equals("gpg"), "gpg", "the others have a ratio and clip it"),
    Rule(f"{_ACTOR}.loss_agg_mode", equals("seq-mean-token-sum"), "seq-mean-token-sum", "the others divide by tokens"),
    Rule(f"{_ACTOR}.use_kl_loss", equals(False), "false", _OTHER),
    Rule(f"{_ACTOR}.entropy_coeff", equals(0), "0", _OTHER),
    Rule(f"{_ACTOR}.shuffle", equals(False), "false", "it would cut groups between mini-batches"),
    Rule(
        f"{_ACTOR}.fsdp_config.qat.enable",
        equals(None, False),
        "false",
        "the gradient through rounded weights is not that of their log-probabilities",
    ),
    Rule(
        f"{_MODEL}.lora.rank",
        equals(None, 0),
        "0, and actor_rollout_ref.model.lora_rank instead",
        "verl's FSDP engine does not read it, and would have no adapter to switch off for the reference",
    ),
    Rule("distillation.enabled", equals(None, False), "false", _OTHER),
    Rule(f"{_ROLLOUT}.n", lambda n: is_number(n) and n >= 2, "at least 2", "GVPO compares responses to a prompt"),
    Rule(f"{_ROLLOUT}.temperature", equals(1), "1.0", "verl scores at the temperature it samples at; GVPO scores at 1"),
    Rule(f"{_ROLLOUT}.do_sample", equals(True, None), "True", "all greedy responses are equal"),
    Rule(f"{_ROLLOUT}.ignore_eos", equals(None, False), "False", "a response ends at its end token; none follows one"),
    Rule(f"{_ROLLOUT}.top_p", equals(1), "1.0", _CUT),
    Rule(f"{_ROLLOUT}.top_k", equals(-1, 0, None), "-1", _CUT),
)


def check_settings(config: Mapping[str, Any]) -> float:
    """Returns GVPO's beta from verl's full configuration.

    Raises: SettingsError: names every setting that would change the GVPO update, and what to set instead.
    """
    wrong = refused(RULES, lambda path: _at(config, path))
    beta = _at(config, "algorithm.kl_ctrl.kl_coef")
    if is_beta(beta) and beta > 0 and not _at(config, "algorithm.use_kl_in_reward"):
        wrong.append(
            f"algorithm.use_kl_in_reward is False and algorithm.kl_ctrl.kl_coef, GVPO's beta, is {beta}; set the first"
            " to True, which brings the reference policy, or the second to 0"
        )
    adapter = _at(config, f"{_MODEL}.lora_adapter_path")
    if adapter is not None and not _at(config, f"{_MODEL}.lora_rank"):
        wrong.append(
            f"{_MODEL}.lora_adapter_path is {adapter!r} and {_MODEL}.lora_rank is 0; set the second to the adapter's"
            " rank: without it verl's FSDP engine does not load the adapter"
        )
    if wrong:
        raise SettingsError("verl cannot train with exact GVPO under these settings:\n" + "\n".join(wrong))
    return float(beta)


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = None if config is None else config.get(name)
    return config
