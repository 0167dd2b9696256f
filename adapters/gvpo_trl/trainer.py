"""GVPO in TRL's GRPOTrainer: TRL samples, rewards, shuffles and steps; this module computes the weights.

Before each optimizer step all its responses are scored without gradient and gathered over the processes, and
`gvpo_core.gvpo_coefficients` computes their coefficients. They replace TRL's advantages, multiplied by the divisors of
its loss. Without old log-probabilities TRL's ratio is 1, so its loss has the gradient -sum_i c_i grad log pi_i.
"""

import copy
import zlib
from typing import Any, cast

import numpy as np
import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import split_tensor_dict

from gvpo_core import gvpo_coefficients, gvpo_loss, gvpo_regret, sequence_logprobs
from gvpo_core.hosts import at_random
from gvpo_core.training.rewards import total as scores
from gvpo_trl.config import GVPOConfig, cannot_sample, cuts_support
from gvpo_trl.reference import check_adapters, check_reference, check_trainable
from gvpo_trl.scoring import check_lengths, check_scores, count_positions_from_the_mask, rope_of, scoring_by_trl

_WHOLE = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
)  # every process has complete parameters


class GVPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with GVPO's objective. Takes the same arguments, with a `GVPOConfig`.

    `loss` in the log is GVPO's loss (Eq. 16) in reward^2. `gvpo/...` are its parts.

    Raises: TypeError, ValueError, RuntimeError: GVPO cannot be exact with this configuration or model.
    """

    beta: float  # this and the next seven are set by TRL
    num_generations: Any
    num_generations_eval: Any
    max_completion_length: Any
    eos_token_ids: Any
    reward_func_names: Any
    model: Any
    args: Any
    _buffered_inputs: Any

    _tag_names = ["trl", "gvpo"]  # noqa: RUF012 - as in TRL
    _name = "GVPO"
    _paper = {  # noqa: RUF012
        "title": "GVPO: Group Variance Policy Optimization for Large Language Model Post-Training",
        "id": "2504.19599",
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: GVPOConfig | None = None, *rest: Any, **named: Any):
        if args is None:
            args = GVPOConfig(f"{str(getattr(model, 'name_or_path', model)).split('/')[-1]}-GVPO")
        if not isinstance(args, GVPOConfig):
            raise TypeError(f"args is a {type(args).__name__}; expected a gvpo_trl.GVPOConfig")
        args.check()
        if args.beta:
            check_adapters(model)
        temperature = args.temperature
        args = copy.copy(args)
        # TRL divides logits by its temperature wherever it scores: set it to 1, and pass the real one to the sampler.
        args.temperature = 1.0
        args.generation_kwargs = {"temperature": temperature, **cast("dict[str, Any]", args.generation_kwargs or {})}
        super().__init__(model, reward_funcs, args, *rest, **named)
        self.args.temperature = self.temperature = temperature
        self._gvpo_rewards = torch.empty(0)
        self._gvpo_groups = 0
        check_trainable(self.model)
        self._check_model()
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                # transformers sets it to pad_token_id. That row then gets no gradient, and often it ends each message.
                module.padding_idx = None
        for model in (self.model, self.ref_model):
            if model is not None:
                count_positions_from_the_mask(model)
        self._rope = rope_of(self.model)
        self._scores_checked = self.accelerator.distributed_type in _WHOLE
        if self._scores_checked:
            check_scores(self)
        if self.beta and self.accelerator.distributed_type in _WHOLE:
            check_reference(self)

    def _check_model(self) -> None:
        if None in self.eos_token_ids:
            raise ValueError("the tokenizer has no eos_token, which TRL needs to end responses; set it")
        if isinstance(self.processing_class, ProcessorMixin):
            raise ValueError(
                f"the processing class is a {type(self.processing_class).__name__}; GVPOTrainer takes text only: pass"
                " a text model and its tokenizer"
            )
        active = at_random(self.model.modules())
        if active:
            raise ValueError(
                f"the model changes activations at random while it trains, and disable_dropout leaves"
                f" {', '.join(active)}: load it with these set to 0; otherwise weights and gradient belong"
                " to two different sub-networks"
            )
        sampling = self.model.generation_config.to_diff_dict() | (self.args.generation_kwargs or {})
        wrong = [] if self.args.allow_truncated_support else cuts_support(sampling)
        overridden = {"top_p", "top_k", "min_p"}  # TRL sets these itself
        wrong = [line for line in wrong if line.split()[0] not in overridden] + cannot_sample(sampling)
        if wrong:
            raise ValueError("the model's generation_config does not fit GVPO:\n" + "\n".join(wrong))

    def _calculate_rewards(self, *args: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **named)
        infinite = rewards.isinf().any(dim=0).tolist()
        if any(infinite):
            names = [name for name, bad in zip(self.reward_func_names, infinite, strict=True) if bad]
            raise FloatingPointError(
                f"reward function {', '.join(names)} returned an infinite reward, or one beyond float32; return None"
                " for a completion without a score"
            )
        self._gvpo_rewards = total_rewards(rewards, self.reward_weights.to(rewards), self._group_size)
        return rewards

    @property
    def _group_size(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        size = self._group_size
        self._check_groups([repr(row.get("prompt")) for row in inputs], size)
        output = super()._generate_and_score_completions(inputs)
        rewards, start = self._gvpo_rewards, self.accelerator.process_index * len(inputs)
        ids = torch.arange(len(rewards), device=rewards.device) // size  # TRL's own groups of the gathered rows
        self._gvpo_groups = len(rewards) // size
        local_rows = slice(start, start + len(inputs))
        # A completely masked completion (mask_truncated_completions, env_mask) leaves its group (Cor. 3.4).
        output["rewards"] = rewards[local_rows].masked_fill(~mask_of(output).any(dim=1), float("nan"))
        output["group_ids"] = ids[local_rows]
        scored = ~self.accelerator.gather(output["rewards"]).isnan()
        if self.model.training and not bool((torch.bincount(ids[scored]) >= 2).any()):
            raise RuntimeError(
                f"no group has 2 scored completions: {int(scored.sum())} of {len(scored)} have a reward and are not"
                " masked; check the warnings of the reward functions and mask_truncated_completions"
            )
        return output

    def _check_groups(self, prompts: list[str], size: int) -> None:
        """Checks that all rows of a group have one prompt. TRL forms groups by position over the processes.

        Raises: RuntimeError: a group has several prompts, for example if processes read different shards of a stream.
        """
        hashes = torch.tensor([zlib.crc32(prompt.encode()) for prompt in prompts], device=self.accelerator.device)
        hashes = self.accelerator.gather(hashes)
        if len(hashes) % size or bool((hashes.view(-1, size) != hashes.view(-1, size)[:, :1]).any()):
            raise RuntimeError(
                f"the rows of a group of {size} have different prompts, so their rewards cannot be compared: the"
                " processes read different parts of the data. Give a Dataset, or an IterableDataset of one shard"
            )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            self._weigh([inputs])
            return inputs
        if self._buffered_inputs is not before:
            draw = torch.Generator().manual_seed(self.args.seed + self._step)  # equal in all processes
            order = torch.randperm(self._gvpo_groups, generator=draw)
            self._buffered_inputs = in_group_order(self._buffered_inputs, order)
            for batch in self._buffered_inputs[self.args.gradient_accumulation_steps :]:
                batch.pop("old_per_token_logps", None)  # the policy will have changed by then
        window, place = self.args.gradient_accumulation_steps, self._step % self.args.steps_per_generation
        if place % window == 0:
            if self.current_gradient_accumulation_steps != window:
                raise RuntimeError(
                    f"an optimizer step has {self.current_gradient_accumulation_steps} micro-batches; expected"
                    f" gradient_accumulation_steps = {window}: the weights of a step need all of them"
                )
            self._weigh(self._buffered_inputs[place : place + window])
        return self._buffered_inputs[place]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, *args: Any, **named: Any
    ) -> Any:
        if self._rope is not None:
            check_lengths(self._rope, attention_mask)
        with scoring_by_trl(self):
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **named)

    @torch.no_grad()
    def _weigh(self, batches: list[dict[str, Any]]) -> None:
        """Stores the coefficients of one optimizer step as the advantages that TRL's loss reads."""
        if not self._scores_checked:  # with sharded parameters only the prepared model can compute
            self._scores_checked = True
            check_scores(self)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logprobs = torch.cat([self._gvpo_logprobs(batch) for batch in batches])
        if self.beta:
            ref = torch.cat([sequence_logprobs(batch["ref_per_token_logps"], mask_of(batch)) for batch in batches])
        else:
            ref = logprobs
        rewards, ids = (torch.cat([batch[name] for batch in batches]) for name in ("rewards", "group_ids"))
        # Every process holds equally many rows; gathered rows are in rank order.
        logprobs, ref, rewards = self.accelerator.gather(torch.stack([logprobs, ref, rewards.to(ref)], dim=1)).unbind(1)
        rows = (logprobs, ref, rewards, self.accelerator.gather(ids))
        coefficients = gvpo_coefficients(*rows, beta=self.beta)
        if not bool(coefficients.isfinite().all()):
            raise FloatingPointError("log-probabilities or rewards of this step are not finite: no step was taken")
        loss = self._log_gvpo(*rows)
        local_coefficients = coefficients.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        start = 0
        for batch in batches:
            size = len(batch["rewards"])
            # TRL's dr_grpo divides by these. Data-parallel gradients are means over processes.
            scale = size * self.max_completion_length * len(batches) * self.accelerator.num_processes
            batch["advantages"] = local_coefficients[start : start + size] * scale
            batch["gvpo_loss"] = loss / len(batches)
            start += size

    def _gvpo_logprobs(self, batch: dict[str, Any]) -> Tensor:
        """Returns (B,) log pi of complete responses. Reuses scores that TRL computed after generation once."""
        mask = mask_of(batch)
        per_token = batch.pop("old_per_token_logps", None)
        if per_token is None:
            ids, length = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1), mask.shape[1]
            attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            per_token, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, attention, length)
        return sequence_logprobs(per_token, mask)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        beta, self.beta = self.beta, 0.0  # GVPO's weights contain the KL: TRL must add none
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        return loss - loss.detach() + inputs["gvpo_loss"]

    def _log_gvpo(self, logprobs: Tensor, ref: Tensor, rewards: Tensor, ids: Tensor) -> Tensor:
        """Writes GVPO's metrics of one optimizer step to TRL's log. Returns the loss, ()."""
        parts = gvpo_loss(logprobs, ref, rewards, ids, beta=self.beta)
        counted = ~rewards.isnan()
        present = int(torch.bincount(ids).gt(0).sum())
        metrics = {
            "implicit_variance": parts.implicit_variance,
            "reward_variance": parts.reward_variance,
            "covariance": parts.covariance,
            "groups/counted": parts.counted_groups,
            "groups/dropped": present - float(parts.counted_groups),
            "responses/unscored": float((~counted).sum()),
        }
        if self.beta:
            regret = gvpo_regret(logprobs, ref, rewards, ids, beta=self.beta)
            metrics |= {"kl": (logprobs - ref)[counted].mean(), "regret": regret.second_order}
            metrics["regret/series"] = regret.series
        log = self._metrics["train" if self.model.training else "eval"]
        for name, value in metrics.items():
            log[f"gvpo/{name}"].append(float(value))
        return parts.loss


def total_rewards(rewards: Tensor, weights: Tensor, size: int) -> Tensor:
    """Returns (N,) weighted sums over the reward functions; NaN: no score.

    The rule is gvpo_core's. A response that lacks a score of one function has no score. A function that scored no
    response of a group does not count for that group, so that one run can have several tasks.

    Args:
      rewards: (N, F), in groups of `size` contiguous rows; NaN: the function gave no score.
      weights: (F,).
    """
    parts = rewards.T.double().cpu().numpy()
    groups = np.arange(len(rewards)) // size
    total = scores.total_rewards(parts, np.zeros(parts.shape, bool), weights.tolist(), groups)
    return torch.from_numpy(total).to(rewards)


def mask_of(batch: dict[str, Any]) -> Tensor:
    """Returns (B, T) bool: the tokens that the model sampled."""
    mask = batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]
    return mask.bool()


def in_group_order(batches: list[dict[str, Any]], order: Tensor) -> list[dict[str, Any]]:
    """Returns the rows of one generation in group order, split into as many micro-batches again.

    TRL shuffles rows before it distributes them, which would spread a group over several optimizer steps.

    Args:
      batches: those of one process, each with equally many rows.
      order: (num_groups,) position of each group, equal in all processes.
    """
    rows = {
        name: torch.cat([batch[name] for batch in batches]) if value.ndim else value
        for name, value in batches[0].items()
    }
    ids = rows["group_ids"]
    chosen = torch.argsort(order.to(ids.device)[ids], stable=True)
    return split_tensor_dict({name: v[chosen] if v.ndim else v for name, v in rows.items()}, len(batches))
