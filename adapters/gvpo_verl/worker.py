"""The actor's training worker: computes the weights of each mini-batch before verl takes its step.

Every mini-batch is scored without gradient, and its scalars are gathered over the data-parallel ranks. The results of
`gvpo_core.gvpo_coefficients` replace the advantages in verl's loss, multiplied by the number of rows that the loss
divides by. Rows of a group may be on any rank and in any micro-batch, fixed or dynamic. Groups may differ in size.
"""

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.padding import response_from_nested

from gvpo_core import dense_group_ids, gvpo_coefficients, gvpo_loss, gvpo_regret
from gvpo_verl.scoring import check_lengths, check_same, check_training_mode, random_states, warn_if_rounded

BETA = "gvpo_beta"  # key of beta in a batch


class GVPOWorker(TrainingWorker):
    """verl's `TrainingWorker`. Batches with a beta get GVPO's weights; others are unchanged."""

    _as_scored = False  # whether old_log_probs are from the current policy
    _checked = False  # whether scores were compared with those of each row alone

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reset(self) -> None:
        """Resets as verl does, then makes the embedding of `config.pad_token_id` trainable.

        transformers sets `padding_idx`, so torch gives that row no gradient as an input. Here masks mark padding.
        """
        super().reset()
        for module in self.engine.module.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None

    def train_mini_batch(self, data: TensorDict) -> Any:
        """Trains as verl does. The first mini-batch uses `old_log_probs`, which are from this policy."""
        self._as_scored = True
        return super().train_mini_batch(data)

    def train_batch(self, data: TensorDict) -> Any:
        """Takes one optimizer step. Raises: KeyError, FloatingPointError, SettingsError: no step was taken."""
        beta = tu.get(data, BETA)
        if beta is None:
            return super().train_batch(data)
        metrics = self._weigh(data, beta)
        self._as_scored = False
        output = super().train_batch(data)
        if output is not None:
            tu.get(output, "metrics").update(metrics)
        return output

    def _weigh(self, data: TensorDict, beta: float) -> dict[str, float]:
        needed = ["rm_scores", "uid", "response_mask", *(["ref_log_prob"] if beta else [])]
        if missing := [name for name in needed if name not in data]:
            raise KeyError(f"the actor's batch lacks {', '.join(missing)}: GVPO's weights need them")
        check_lengths(self.model_config.hf_config, data["input_ids"].offsets().diff())
        if not self._checked:
            self._check_scores(data)
            for key in ("old_log_probs", *(["ref_log_prob"] if beta else [])):
                warn_if_rounded(key, data[key].values())
            self._checked = True
        mask = data["response_mask"]
        logprobs = _sums(data["old_log_probs"] if self._as_scored else self._score(data), mask)
        ref = _sums(data["ref_log_prob"], mask) if beta else logprobs
        rewards = _sums(data["rm_scores"], torch.ones_like(mask))
        rewards[_sums(mask, mask) == 0] = np.nan  # padding and completely masked responses leave their group
        uids = [str(uid) for uid in tu.get(data, "uid")]
        group = self.engine.get_data_parallel_group()
        rank = self.engine.get_data_parallel_rank()
        parts: list[Any] = [None] * self.engine.get_data_parallel_size()
        torch.distributed.all_gather_object(parts, (uids, logprobs, ref, rewards), group=group)
        ids, num_groups = dense_group_ids(uid for part in parts for uid in part[0])
        logprobs, ref, rewards = (np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
        coefficients = gvpo_coefficients(logprobs, ref, rewards, ids, beta=beta, num_groups=num_groups)
        if not np.isfinite(coefficients).all():
            raise FloatingPointError("log-probabilities or scores of this mini-batch are not finite: no step was taken")
        start = sum(len(part[0]) for part in parts[:rank])
        local_coefficients = torch.from_numpy(coefficients[start : start + len(uids)]).float()
        # seq-mean-token-sum divides by global_batch_size. The step averages the ranks' gradients, each times dp_size.
        per_row = (local_coefficients * tu.get(data, "global_batch_size")).to(mask.values().device)
        per_token = per_row.repeat_interleave(mask.offsets().diff())
        data["advantages"] = torch.nested.nested_tensor_from_jagged(per_token, mask.offsets())
        return _metrics(logprobs, ref, rewards, ids, num_groups, beta)

    def _check_scores(self, data: TensorDict) -> None:
        """Scores this rank's longest and shortest row together, and in training mode, and compares with each alone.

        Every rank runs the same passes.
        """
        lengths = data["input_ids"].offsets().diff()
        rows = [int(lengths.argmax()), int(lengths.argmin())]
        score = lambda places, **options: (
            self._score(tu.index_select_tensor_dict(data, places), one_batch=True, **options).values().float()
        )
        name = type(self.engine.module).__name__
        alone = torch.cat([score([row]) for row in rows])
        rounded = self.engine._autocast_dtype != torch.float32
        check_same(name, score(rows), alone, "in a micro-batch of several rows", rounded=rounded)
        before = random_states()
        trained = score(rows, training=True)
        check_training_mode(name, self.engine.module.modules(), before)
        check_same(name, trained, alone, "in training mode", rounded=rounded)

    def _score(self, data: TensorDict, *, one_batch: bool = False, training: bool = False) -> torch.Tensor:
        """Returns (B, T) nested token log-probabilities of the responses, from the same passes as in the step.

        Args:
          one_batch: put all rows in one micro-batch.
          training: use training mode, as in the step.
        """
        batch = data.copy()
        if one_batch:
            tu.assign_non_tensor(batch, use_dynamic_bsz=False, micro_batch_size_per_gpu=len(data), force_group_size=1)
        settings = {
            "use_remove_padding": self.model_config.get("use_remove_padding", False),
            "use_dynamic_bsz": self.engine_config.use_dynamic_bsz,
            "max_token_len_per_gpu": self.engine_config.max_token_len_per_gpu,
            "micro_batch_size_per_gpu": self.engine_config.micro_batch_size_per_gpu,
            "use_fused_kernels": self.engine_config.use_fused_kernels,
        }
        missing = {name: value for name, value in settings.items() if name not in batch}
        tu.assign_non_tensor(batch, **missing, calculate_entropy=False, distillation_use_topk=False)
        with self.engine.eval_mode(disable_auto_offload=tu.get(data, "disable_auto_offload", default=False)):
            self.engine.module.train(training)
            output = self.engine.infer_batch(batch)
        return response_from_nested(output["model_output"]["log_probs"], data["response_mask"])


def _sums(values: torch.Tensor, mask: Any) -> np.ndarray:
    """Returns (B,) float64 sums of (B, T) nested values where the mask of the same rows is True."""
    masked = values.values().double().cpu() * mask.values().cpu().bool()
    rows = torch.arange(values.size(0)).repeat_interleave(mask.offsets().diff().cpu())
    return torch.zeros(values.size(0), dtype=torch.float64).index_add(0, rows, masked).numpy()


def _metrics(
    logprobs: np.ndarray, ref: np.ndarray, rewards: np.ndarray, ids: np.ndarray, num_groups: int, beta: float
) -> dict[str, float]:
    parts = gvpo_loss(logprobs, ref, rewards, ids, beta=beta, num_groups=num_groups)
    scored = ~np.isnan(rewards)
    metrics = {
        "loss": parts.loss,
        "implicit_variance": parts.implicit_variance,
        "reward_variance": parts.reward_variance,
        "covariance": parts.covariance,
        "groups/counted": parts.counted_groups,
        "groups/dropped": len(set(ids[scored].tolist())) - parts.counted_groups,
    }
    if beta and scored.any():
        regret = gvpo_regret(logprobs, ref, rewards, ids, beta=beta, num_groups=num_groups)
        metrics |= {
            "kl": (logprobs - ref)[scored].mean(),
            "regret": regret.second_order,
            "regret/series": regret.series,
        }
    return {f"gvpo/{name}": float(value) for name, value in metrics.items()}
