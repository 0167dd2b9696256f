"""GVPO's settings in Tunix, and checks of a cluster's settings before a run."""

import dataclasses
import logging
from typing import Any

from tunix.rl import rl_cluster as rl_cluster_lib
from tunix.rl.grpo.grpo_learner import GRPOConfig

from gvpo_core.hosts import SettingsError, check_beta

_log = logging.getLogger("gvpo")
_UNUSED = ("epsilon", "loss_agg_mode", "loss_algo", "kl_loss_mode", "kl_clamp_value")  # only GRPO uses these


@dataclasses.dataclass(kw_only=True)
class GVPOConfig(GRPOConfig):
    """Replaces GRPOConfig.

    Attributes:
      num_generations: k, responses per prompt.
      num_iterations: optimizer steps on each mini-batch; GVPO needs no importance weights for this (Cor. 3.2).
      beta: KL coefficient, reward units per nat.
      allow_truncated_support: accept top_p and top_k, which exclude responses that Cor. 3.2 needs.
    Raises: SettingsError: a GRPO setting that GVPO does not use was changed.
    """

    algo_variant: str = "gvpo"
    advantage_estimator: str = "gvpo"
    policy_loss_fn: str = "gvpo"
    reward_manager: str = "gvpo"
    num_generations: int = 8
    beta: float = 0.1
    allow_truncated_support: bool = False

    def __post_init__(self) -> None:
        for name in ("algo_variant", "advantage_estimator", "policy_loss_fn", "reward_manager"):
            if getattr(self, name) != "gvpo":
                raise SettingsError(f"{name} = {getattr(self, name)!r}; GVPO needs all of them: leave it 'gvpo'")
        defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
        for name in _UNUSED:
            if getattr(self, name) != defaults[name]:
                raise SettingsError(
                    f"{name} = {getattr(self, name)!r}: GVPO has no ratio, no clip and one aggregation, token sums a"
                    f" response; leave it at {defaults[name]!r}"
                )
        if self.num_generations < 2:
            raise SettingsError(
                f"num_generations = {self.num_generations}; GVPO compares at least 2 responses per prompt"
            )
        if self.num_iterations < 1:
            raise SettingsError(f"num_iterations = {self.num_iterations}; expected at least 1")
        check_beta(self.beta)


def check_cluster(cluster: rl_cluster_lib.RLCluster, config: GVPOConfig) -> None:
    """Raises: SettingsError: a setting would make steps inexact."""
    if not isinstance(config, GVPOConfig):
        raise SettingsError(f"algo_config is a {type(config).__name__}; GVPOLearner takes a GVPOConfig")
    training, rollout = cluster.cluster_config.training_config, cluster.cluster_config.rollout_config
    if training.max_seq_token_per_tpu is not None:
        raise SettingsError(
            f"max_seq_token_per_tpu = {training.max_seq_token_per_tpu}: packing puts parts of groups into different"
            " rows; set it to None"
        )
    by_mode = rollout if isinstance(rollout, dict) else {rl_cluster_lib.Mode.TRAIN: rollout}
    for options in by_mode.values():
        if len(set(options.eos_tokens or [])) > 1:
            raise SettingsError(
                f"eos_tokens = {list(options.eos_tokens)}: Tunix cuts the end token off its samples, so which one was"
                " sampled is lost; give the one that the model ends with"
            )
    _check_sampling(by_mode[rl_cluster_lib.Mode.TRAIN], config)
    if cluster.cluster_config.rollout_engine != "vanilla":
        _log.warning("gvpo_tunix was tested with rollout_engine 'vanilla' only")
    if config.beta > 0:
        try:
            cluster.inference_worker.get_model("reference")
        except ValueError as error:
            raise SettingsError(
                f"beta = {config.beta} needs the reference's log-probs: give RLCluster reference="
            ) from error


def _check_sampling(rollout: Any, config: GVPOConfig) -> None:
    if rollout.top_p is None or rollout.temperature <= 0:
        raise SettingsError(
            f"temperature = {rollout.temperature} and top_p = {rollout.top_p} sample greedily in Tunix: all responses"
            " of a group would be equal; set a temperature above 0 and top_p = 1.0"
        )
    cut = rollout.top_p < 1 or (rollout.top_k is not None and rollout.top_k > 0)
    if cut and not config.allow_truncated_support:
        raise SettingsError(
            f"top_p = {rollout.top_p} and top_k = {rollout.top_k} exclude responses that Cor. 3.2 needs;"
            " set top_p = 1.0 and top_k = None, or allow_truncated_support = True"
        )
