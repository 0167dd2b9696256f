"""GVPO in Tunix's registry: the loss, the advantages, and a reward manager that allows missing scores."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import common, function_registry
from tunix.rl.reward_manager import SequenceRewardManager

from gvpo_core import gvpo_loss, gvpo_surrogate, gvpo_weights, sequence_logprobs
from gvpo_core.training.rewards.total import total_rewards


@flax.struct.dataclass(frozen=True)
class TrainExample(common.TrainExample):
    """Tunix's class, with complete groups in contiguous rows. `advantages` are D(R); NaN: the response has no score."""

    share: jax.Array | None = None  # (B,) equal numbers: this micro-batch's share of the step x number of micro-batches


@function_registry.register_policy_loss_fn("gvpo")
def gvpo_policy_loss(
    model: nnx.Module, train_example: TrainExample, algo_config: Any, pad_id: int, eos_id: int, **_: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns a micro-batch's loss and its parts. Value: GVPO's loss. Gradient: the step at policy-gradient scale.

    Log-probs use the current parameters at temperature 1, and are sums over each response's tokens including the end
    token. There is no ratio to older log-probs.
    """
    graphdef, state = nnx.split(model)
    per_token = common.compute_per_token_logps(
        graphdef,
        state,
        prompt_tokens=train_example.prompt_ids,
        completion_tokens=train_example.completion_ids,
        pad_id=pad_id,
        eos_id=eos_id,
        stop_gradient=False,
        return_logits=False,
        temperature=1.0,
    )
    mask = train_example.completion_mask.astype(bool)
    logprobs = sequence_logprobs(per_token, mask)
    if train_example.ref_per_token_logps is None:  # beta is 0
        ref_logprobs = jax.lax.stop_gradient(logprobs)
    else:
        ref_logprobs = sequence_logprobs(train_example.ref_per_token_logps, mask)
    k = algo_config.num_generations
    num_groups, rest = divmod(len(logprobs), k)
    if rest:
        raise ValueError(f"a micro-batch has {len(logprobs)} rows, which are not complete groups of {k}")
    rows = (logprobs, ref_logprobs, train_example.advantages, jnp.arange(len(logprobs)) // k)
    options = {"beta": algo_config.beta, "num_groups": num_groups}
    surrogate, parts = gvpo_surrogate(*rows, **options), gvpo_loss(*rows, **options)
    parts = jax.tree.map(jax.lax.stop_gradient, parts)
    scored = ~jnp.isnan(train_example.advantages)
    log_ratio = jax.lax.stop_gradient(logprobs - ref_logprobs)
    aux = {
        "kl": jnp.where(scored, log_ratio, 0.0).sum() / jnp.maximum(scored.sum(), 1),
        "gvpo/implicit_variance": parts.implicit_variance,
        "gvpo/reward_variance": parts.reward_variance,
        "gvpo/covariance": parts.covariance,
        "gvpo/groups": parts.counted_groups,
    }
    assert train_example.share is not None, "made by gvpo_tunix's learner"
    share = train_example.share.mean()
    return share * (parts.loss + surrogate - jax.lax.stop_gradient(surrogate)), aux


METRICS = ("kl", "gvpo/implicit_variance", "gvpo/reward_variance", "gvpo/covariance", "gvpo/groups")


@function_registry.register_advantage_estimator("gvpo")
def centred_rewards(rewards: np.ndarray, num_generations: int, **_: Any) -> np.ndarray:
    """Returns (N,) D(R), reward units; NaN: the response has no score. Rows of a group are contiguous."""
    rewards = np.asarray(rewards, dtype=np.float64)
    zeros, ids = np.zeros(len(rewards)), np.arange(len(rewards)) // num_generations
    return np.where(np.isnan(rewards), np.nan, gvpo_weights(zeros, zeros, rewards, ids, beta=0.0))


@function_registry.register_reward_manager("gvpo")
class GVPORewardManager(SequenceRewardManager):
    """Tunix's sum of rewards, except that None and NaN are missing scores instead of 0.

    A response that lacks a score of one function has no reward. A function that scored no response of a group does not
    count for that group, so that one run can have several tasks with a function each.
    """

    def __init__(self, reward_fns: Any, algo_config: Any, **options: Any) -> None:
        functions = list(reward_fns) if isinstance(reward_fns, Sequence) else [reward_fns]
        self._scores: list[np.ndarray] = []  # one per function; NaN: no score
        super().__init__([self._recording(function) for function in functions], algo_config, **options)

    def _recording(self, function: Callable[..., Any]) -> Callable[..., list[float]]:
        @functools.wraps(function)
        def recording(*, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            rewards = function(prompts=prompts, completions=completions, **columns)
            scores = np.array([np.nan if score is None else float(score) for score in rewards])
            name = getattr(function, "__name__", repr(function))
            if len(scores) != len(prompts):
                raise ValueError(f"{name} gave {len(scores)} rewards for {len(prompts)} responses")
            if np.isinf(scores).any():
                i = int(np.isinf(scores).argmax())
                raise ValueError(
                    f"{name} gave {scores[i]} for {completions[i][:60]!r}; expected a finite reward, or None"
                )
            missing = np.isnan(scores)
            self._scores.append(scores)
            stand_in = scores[~missing].mean() if not missing.all() else 0.0  # keeps the mean in Tunix's log
            return np.where(missing, stand_in, scores).tolist()

        return recording

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> dict[str, Any]:
        """Returns Tunix's {"rewards": (N,), "log_metrics": ...}."""
        self._scores = []
        summed = super().__call__(prompts, completions, **columns)
        parts = np.stack(self._scores)
        groups = np.arange(len(prompts)) // self.algo_config.num_generations
        total = total_rewards(parts, np.zeros(parts.shape, bool), [1.0] * len(parts), groups)
        return summed | {"rewards": total}
