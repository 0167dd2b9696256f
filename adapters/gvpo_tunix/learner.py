"""GVPOLearner: Tunix's GRPOLearner with GVPO's samples, scores and steps.

prompts -> k samples each, with end tokens and a new seed for each call
        -> reference log-probs at temperature 1, rewards -> complete groups in micro-batches
        -> an optimizer step over all micro-batches of a mini-batch, each with its exact share
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tunix.rl import rl_cluster as rl_cluster_lib
from tunix.rl.grpo.grpo_learner import GRPOLearner

from gvpo_core.hosts import SettingsError
from gvpo_core.training.improve import NoSignalError
from gvpo_tunix.config import GVPOConfig, check_cluster
from gvpo_tunix.folder import check_config, check_files, check_reference
from gvpo_tunix.objective import METRICS, TrainExample, centred_rewards
from gvpo_tunix.rope import mend_and_check

_log = logging.getLogger("gvpo")
_TRAIN = rl_cluster_lib.Mode.TRAIN


class _Samples(NamedTuple):
    texts: list[str]
    prompt_ids: np.ndarray  # (N, P) padded on the left
    prompt_mask: np.ndarray  # (N, P) bool
    ids: np.ndarray  # (N, T) padded on the right
    mask: np.ndarray  # (N, T) bool, including the end token
    finished: np.ndarray  # (N,) bool
    usable: np.ndarray  # (N,) bool


class GVPOLearner(GRPOLearner[GVPOConfig]):
    """Replaces GRPOLearner. Has the same arguments and `train`, and:

    Args:
      model_path: the Hugging Face folder that the actor was loaded from; None: there is none. The actor is compared
        with its config.json. The folder must have no safetensors of other models.
    Raises: SettingsError: a setting would make steps inexact.
    """

    def __init__(
        self,
        rl_cluster: rl_cluster_lib.RLCluster,
        algo_config: GVPOConfig,
        reward_fns: Any,
        metric_fns: Sequence[Any] | None = None,
        data_shuffle_seed: int | None = None,
        *,
        model_path: str | Path | None,
    ) -> None:
        check_cluster(rl_cluster, algo_config)
        if model_path is not None:
            check_files(model_path)
        mend_and_check(rl_cluster.actor_trainer.model, model_path)
        if model_path is not None:
            check_config(rl_cluster.actor_trainer.model, model_path)
        if algo_config.beta > 0:
            check_reference(rl_cluster.actor_trainer.model, rl_cluster.inference_worker.get_model("reference"))
        self._sampling = threading.Lock()  # evaluation may run while the next batch is sampled
        self._calls = 0
        super().__init__(rl_cluster, algo_config, reward_fns, metric_fns, data_shuffle_seed)
        rl_cluster.actor_trainer.with_rl_metrics_to_log(dict.fromkeys(METRICS, np.mean))

    # -- samples

    def _generate_and_compute_advantage(self, training_input: Any, mode: rl_cluster_lib.Mode = _TRAIN) -> TrainExample:
        """Returns complete scored groups for prompts that are repeated k times. Tunix calls this method."""
        columns = {name: values for name, values in training_input.items() if name != "prompts"}
        prompts = list(training_input["prompts"])
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise SettingsError(
                f"a prompt is a {type(prompts[0]).__name__}; expected text: Tunix takes batches as NumPy arrays,"
                ' {"prompts": np.array([...])}, and makes arrays of the texts of a list'
            )
        with self._sampling:
            samples = self._sample(prompts, mode)
            ref = self._reference(samples) if self.algo_config.beta > 0 else None
        rewards = self._compute_rewards(prompts=prompts, completions=samples.texts, mode=mode, **columns)
        rewards = np.where(samples.usable, rewards, np.nan)
        advantages = centred_rewards(rewards, self.algo_config.num_generations)
        lengths = samples.mask.sum(axis=1)
        metrics = {
            "rewards/score/mean": (float(np.nanmean(rewards)) if np.isfinite(rewards).any() else 0.0, np.mean),
            "completions/mean_length": (lengths.mean(), np.mean),
            "completions/max_length": (lengths.max(), np.max),
            "completions/min_length": (lengths.min(), np.min),
            "completions/finished": (samples.finished.mean(), np.mean),
            "gvpo/unscored": (float(np.isnan(rewards).mean()), np.mean),
        }
        self.rl_cluster.buffer_metrics(metrics, mode=mode)
        for function in self.metric_fns:
            function_metrics = function(
                prompts=prompts, completions=samples.texts, advantages=advantages, rewards=rewards, **columns
            )
            self.rl_cluster.buffer_metrics(function_metrics, mode=mode)
        return TrainExample(
            prompt_ids=jnp.asarray(samples.prompt_ids),
            prompt_mask=jnp.asarray(samples.prompt_mask),
            completion_ids=jnp.asarray(samples.ids),
            completion_mask=jnp.asarray(samples.mask),
            ref_per_token_logps=ref,
            advantages=jnp.asarray(advantages, dtype=jnp.float32),
            old_per_token_logps=None,
            share=jnp.ones(len(prompts), dtype=jnp.float32),
        )

    def _sample(self, prompts: list[str], mode: rl_cluster_lib.Mode) -> _Samples:
        cluster, config = self.rl_cluster, self.rl_cluster.get_rollout_config(mode)
        pad, limit = cluster.rollout.pad_id(), config.max_tokens_to_generate
        ends = list(config.eos_tokens or [cluster.rollout.eos_id()])
        chunk = (self._rollout_micro_batch_size or len(prompts)) * self.algo_config.num_generations
        texts, tokens, padded = [], [], []
        for start in range(0, len(prompts), chunk):
            with _changed(config, seed=self._seed(config.seed)):
                output = cluster.generate(prompts=prompts[start : start + chunk], mode=mode)
            texts += output.text
            tokens += [np.asarray(row).tolist() for row in output.tokens]
            padded += list(np.asarray(output.left_padded_prompt_tokens))
        # Tunix removes the end token of samples. A sample shorter than the limit had one.
        responses = [row + ends[:1] if len(row) < limit and row[-1:] != ends[:1] else row for row in tokens]
        finished = np.array([bool(row) and row[-1] in ends for row in responses])
        usable = np.array([pad not in row[:-1] and (pad in ends or row[-1] != pad) for row in responses])
        ids = np.full((len(responses), limit), pad, dtype=np.int32)
        mask = np.zeros(ids.shape, dtype=bool)
        for i, row in enumerate(responses):
            ids[i, : len(row)], mask[i, : len(row)] = row, True
        return _Samples(texts, *_prompts(padded, prompts, pad), ids, mask, finished, usable)

    def _seed(self, configured: Any) -> int:
        """Returns a new reproducible seed for each call. Tunix would use `configured` every time."""
        base = 0 if configured is None else configured
        if isinstance(base, jax.Array):
            base = jax.random.key_data(base) if jnp.issubdtype(base.dtype, jax.dtypes.prng_key) else base
        entropy = (
            *np.atleast_1d(np.asarray(base, dtype=np.uint32)).tolist(),
            self.rl_cluster.global_steps,
            self._calls,
        )
        self._calls += 1
        return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)

    def _reference(self, samples: _Samples) -> jax.Array:
        """Returns (N, T) log-probs at temperature 1. Tunix would score at the sampling temperature."""
        cluster = self.rl_cluster
        rows = self._compute_logps_micro_batch_size
        with _changed(cluster.get_rollout_config(_TRAIN), temperature=1.0):
            return cluster.get_ref_per_token_logps(
                prompt_tokens=jnp.asarray(samples.prompt_ids),
                completion_tokens=jnp.asarray(samples.ids),
                pad_id=cluster.rollout.pad_id(),
                eos_id=cluster.rollout.eos_id(),
                micro_batch_size=rows * self.algo_config.num_generations if rows else None,
            )

    # -- steps

    def _prepare_data(self, **options: Any) -> None:
        if options.get("mode", _TRAIN) is _TRAIN:
            options["data_queue"] = _WholeSteps(
                options["data_queue"],
                options["proceed_num_steps"],
                options["batch_repeat"],
                self.algo_config.num_generations,
            )
        super()._prepare_data(**options)


class _WholeSteps:
    """Wraps Tunix's queue and holds micro-batches until a mini-batch is complete, to set each one's share of the step.

    optax averages the gradients of a step's M micro-batches, however many groups count in each. A group counts if it
    has two scored responses. With the share M G_j / G for micro-batch j, the average is over the G groups that count.
    """

    def __init__(self, queue: Any, micro_batches: int, repeats: int, k: int) -> None:
        self._queue, self._micro_batches, self._repeats, self._k = queue, micro_batches, repeats, k
        self._held: list[TrainExample] = []

    def put(self, item: list[TrainExample] | None) -> None:
        """Adds a micro-batch. None ends the mini-batch."""
        if item is not None:
            self._held += item
            return
        try:
            self._release()
        finally:
            self._queue.put(None)

    def _release(self) -> None:
        if len(self._held) != self._micro_batches * self._repeats:
            if self._held:
                _log.warning("the data ends within a mini-batch: its %d micro-batches are kept", len(self._held))
            return
        counts = [self._counted(example) for example in self._held]
        groups = sum(counts) / self._repeats
        if not groups:
            raise NoSignalError("no group of the mini-batch has two scored responses; check the reward functions")
        for example, counted in zip(self._held, counts, strict=True):
            assert example.share is not None  # all in `_held` have one
            share = jnp.full_like(example.share, self._micro_batches * counted / groups)
            self._queue.put([dataclasses.replace(example, share=share)])

    def _counted(self, example: TrainExample) -> int:
        scored = ~np.isnan(np.asarray(example.advantages)).reshape(-1, self._k)
        return int((scored.sum(axis=1) >= 2).sum())


def _prompts(padded: list[np.ndarray], texts: list[str], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (N, P) ids and mask of one width.

    Raises: SettingsError: a prompt contains the padding token, which Tunix's masks would hide from the model.
    """
    width = max(len(row) for row in padded)
    ids = np.full((len(padded), width), pad, dtype=np.int32)
    mask = np.zeros(ids.shape, dtype=bool)
    for i, row in enumerate(padded):
        ids[i, width - len(row) :] = row
        real = np.flatnonzero(ids[i] != pad)
        first = int(real[0]) if len(real) else width - 1
        mask[i, first:] = True
        if (ids[i, first:] == pad).any():
            raise SettingsError(
                f"the prompt {texts[i][:60]!r} holds the padding token, id {pad}, which Tunix hides from the model"
                " at every position; give the tokenizer a separate padding token: tokenizer.pad_token = ..."
            )
    return ids, mask


@contextlib.contextmanager
def _changed(config: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
