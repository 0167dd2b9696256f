"""GVPO in mlx-lm's trainer: the `loss` and `iterate_batches` that its `train` takes, and checks before it starts.

mlx-lm adds up the gradients of `grad_accumulation_steps` micro-batches on each process and divides by their number M,
whatever they contain. So the loss of each micro-batch is M times its share of the step's loss. This makes the step
exact: along -sum_i c_i grad log pi_i over all responses of the step, with `gvpo_coefficients` c. If every group fits a
micro-batch, c is computed inside the loss. Otherwise all responses of the step are scored first, without gradient, and
c is constant in the micro-batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gvpo_mlx.logprobs import logsumexp
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback

from gvpo_core import gvpo_coefficients, gvpo_loss, gvpo_surrogate
from gvpo_core.hosts import SettingsError, check_beta
from gvpo_core.training.data import DataError
from gvpo_mlx_lm import batches
from gvpo_mlx_lm.batches import StepResponse
from gvpo_mlx_lm.groups import Group
from gvpo_mlx_lm.models import adapters_off, check_model, dropouts, quantized

_BLOCK = 32  # lengths are padded to multiples of this, so that few shapes are compiled


def train(
    model: nn.Module,
    optimizer: Any,
    train_groups: Sequence[Group],
    val_groups: Sequence[Group] | None = None,
    *,
    args: trainer.TrainingArgs,
    model_path: str | Path,
    beta: float = 0.1,
    groups_per_step: int | None = None,
    seed: int = 0,
    training_callback: TrainingCallback | None = None,
) -> "GVPO":
    """Runs mlx-lm's own trainer on scored responses.

    The reference is the model with its adapters off, or in full fine-tuning the model at the start.

    Args:
      model: frozen, with LoRA or DoRA layers, as `mlx_lm.lora` makes it.
      args: mlx-lm's. `batch_size` is the most responses in one pass of the model, over all processes. `iters` counts
        micro-batches; `grad_accumulation_steps` of them make an optimizer step.
      model_path: the folder or hub name that `model` was loaded from, to check the model against its files.
      beta: KL coefficient, reward units per nat.
      groups_per_step: prompts per optimizer step; default: as many as fit in any case.
    Raises: SettingsError: a setting would make steps inexact. DataError: groups do not fit.
    """
    gvpo = GVPO(model, args, model_path, beta=beta, groups_per_step=groups_per_step, seed=seed)
    scored = gvpo.with_reference(train_groups)
    trainer.train(
        model=model,
        optimizer=optimizer,
        train_dataset=scored,
        val_dataset=None if val_groups is None else gvpo.with_reference(val_groups),
        args=args,
        loss=gvpo.loss,
        iterate_batches=gvpo.iterate_batches,
        training_callback=cast(Any, training_callback),  # mlx-lm takes None
    )
    return gvpo


class GVPO:
    """The arguments of mlx-lm's `train` for GVPO: datasets from `with_reference`, `loss` and `iterate_batches`."""

    def __init__(
        self,
        model: nn.Module,
        args: trainer.TrainingArgs,
        model_path: str | Path,
        *,
        beta: float = 0.1,
        groups_per_step: int | None = None,
        seed: int = 0,
    ) -> None:
        """Checks the settings; see `train`."""
        self.model, self.args, self.beta, self.groups_per_step, self.seed = model, args, beta, groups_per_step, seed
        self.world = mx.distributed.init()
        self.longest = check_model(model, model_path)
        self._check()

    def _check(self) -> None:
        args, size = self.args, self.world.size()
        check_beta(self.beta)
        if args.batch_size < 1 or args.batch_size % size:
            raise SettingsError(
                f"batch_size = {args.batch_size} over {size} processes; expected a positive multiple of {size}"
            )
        if args.grad_accumulation_steps < 1:
            raise SettingsError(f"grad_accumulation_steps = {args.grad_accumulation_steps}; expected at least 1")
        if args.iters % args.grad_accumulation_steps:
            raise SettingsError(
                f"iters = {args.iters} is not a multiple of grad_accumulation_steps = {args.grad_accumulation_steps}:"
                " mlx-lm would compute the last micro-batches and discard them; set a multiple"
            )
        if not sum(p.size for _, p in tree_flatten(self.model.trainable_parameters())):
            raise SettingsError(
                "no parameter of the model is trainable: check lora_parameters' keys and rank, or unfreeze layers"
            )
        if trained := [name for name, module in quantized(self.model) if module.trainable_parameters()]:
            raise SettingsError(
                f"{trained[0]} has quantized weights, which take no gradient: train LoRA or DoRA adapters, or load the"
                " model in 16 or 32 bits"
            )
        if active := dropouts(self.model):
            raise SettingsError(
                f"dropout of {active[0][1]:g} in {active[0][0]}: GVPO's weights need the log-probabilities of the"
                " model without dropout; set lora_parameters: {dropout: 0.0}"
            )

    # -- data

    def with_reference(self, groups: Sequence[Group]) -> list[Group]:
        """Returns the groups with the reference's log-probs, computed once.

        Raises: SettingsError: rows are longer than a window that mlx-lm omits. DataError: ids are not tokens of the
          model.
        """
        self._check_ids(groups)
        rows = [(group.prompt, response) for group in groups for response in group.responses]
        tokens = max((len(prompt) + len(response) for prompt, response in rows), default=0)
        if self.longest is not None and tokens > self.longest:
            raise SettingsError(
                f"a prompt and its response have {tokens} tokens, and mlx-lm omits the model's sliding window of"
                f" {self.longest}: log-probs are right up to that length only; set max_seq_length = {self.longest}"
            )
        with adapters_off(self.model):
            scores = iter(self._score(rows).tolist())
        return [replace(group, ref_logprobs=tuple(islice(scores, len(group)))) for group in groups]

    def _check_ids(self, groups: Sequence[Group]) -> None:
        vocabulary = self.model(mx.array([[0]])).shape[-1]  # only the shape; nothing is evaluated
        for number, group in enumerate(groups):
            ids = [*group.prompt, *(i for response in group.responses for i in response)]
            if wrong := [i for i in ids if not 0 <= i < vocabulary]:
                raise DataError(
                    f"group {number} holds {wrong[0]}, which is not a token id of the model (0 to {vocabulary - 1})"
                )

    def iterate_batches(
        self, dataset: Sequence[Group], batch_size: int, max_seq_length: int, loop: bool = False, comm_group: Any = None
    ) -> Iterator[tuple[Any, ...]]:
        """Replaces mlx-lm's `iterate_batches`. Yields the micro-batches of this process.

        Args:
          loop: yield complete steps without end; else the dataset once.
        Raises: SettingsError, DataError: see `train`.
        """
        world = comm_group or self.world
        if any(group.ref_logprobs is None for group in dataset):
            raise SettingsError("the dataset has no reference log-probs; pass GVPO.with_reference(groups)")
        if not loop:
            yield from self._evaluation(dataset, batch_size // world.size(), world)
            return
        per_process, rows = self.args.grad_accumulation_steps, batch_size // world.size()
        micro_batches = per_process * world.size()
        per_step = self._groups_per_step(dataset, micro_batches * rows)
        for chosen in batches.epochs(len(dataset), per_step, self.seed):
            groups = [dataset[g] for g in chosen]
            parts = batches.grouped_micro_batches(groups, micro_batches, rows)
            if parts is not None:
                for part in parts[world.rank() :: world.size()]:
                    share = micro_batches * len({row.group for row in part}) / len(groups)
                    yield self._arrays(groups, part, share=share)
                continue
            parts = batches.split_groups(groups, micro_batches)
            value, coefficients = self._scored(groups, parts, world)
            for part in parts[world.rank() :: world.size()]:
                c = [micro_batches * coefficients[row] for row in part]
                yield self._arrays(groups, part, share=1.0, scored=(value, c))

    def _groups_per_step(self, dataset: Sequence[Group], capacity: int) -> int:
        largest = max(map(len, dataset))
        per_step = self.groups_per_step or max(1, min(capacity // largest, len(dataset)))
        most = sum(sorted(map(len, dataset), reverse=True)[:per_step])
        if not 1 <= per_step <= len(dataset):
            raise SettingsError(f"groups_per_step = {per_step}; expected 1 to {len(dataset)}, the number of groups")
        if most > capacity:
            raise SettingsError(
                f"{per_step} groups of up to {largest} responses may be {most} responses, and batch_size ="
                f" {self.args.batch_size} times grad_accumulation_steps = {self.args.grad_accumulation_steps} holds"
                f" {capacity}: raise grad_accumulation_steps, which costs no memory, or batch_size"
            )
        return per_step

    def _evaluation(self, dataset: Sequence[Group], rows: int, world: Any) -> Iterator[tuple[Any, ...]]:
        """Yields a group at a time. Its count is 1, so that mlx-lm's mean is `gvpo_loss` over the dataset."""
        for group in dataset[world.rank() :: world.size()]:
            responses = [StepResponse(0, i) for i in range(len(group))]
            scored = None
            if len(group) > rows:
                logprobs = self._score([(group.prompt, response) for response in group.responses])
                scored, responses = (self._value([group], logprobs), [0.0] * rows), responses[:rows]
            ids, lengths, *rest, _ = self._arrays([group], responses, share=1.0, scored=scored)
            yield ids, lengths, *rest, mx.array(1)

    def _scored(
        self, groups: Sequence[Group], parts: list[list[StepResponse]], world: Any
    ) -> tuple[float, dict[StepResponse, float]]:
        """Returns the step's loss and the coefficient of each response. Each process scores its own rows."""
        all_rows = [row for part in parts for row in part]
        places = {row: i for i, row in enumerate(all_rows)}
        local_rows = [row for part in parts[world.rank() :: world.size()] for row in part]
        logprobs = np.zeros(len(all_rows), dtype=np.float32)
        local_logprobs = self._score(
            [(groups[row.group].prompt, groups[row.group].responses[row.response]) for row in local_rows]
        )
        logprobs[[places[row] for row in local_rows]] = local_logprobs
        logprobs = np.array(mx.distributed.all_sum(mx.array(logprobs), group=world), dtype=np.float64)
        ref = np.array([groups[row.group].reference(row.response) for row in all_rows])
        rewards = np.array([groups[row.group].rewards[row.response] for row in all_rows])
        ids = np.array([row.group for row in all_rows])
        c = gvpo_coefficients(logprobs, ref, rewards, ids, beta=self.beta)
        loss = gvpo_loss(logprobs, ref, rewards, ids, beta=self.beta).loss
        return float(loss), dict(zip(all_rows, c.tolist(), strict=True))

    def _value(self, groups: Sequence[Group], logprobs: np.ndarray) -> float:
        ids = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
        ref, rewards = (np.concatenate([getattr(g, x) for g in groups]) for x in ("ref_logprobs", "rewards"))
        return float(gvpo_loss(logprobs.astype(np.float64), ref, rewards, ids, beta=self.beta).loss)

    def _score(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> np.ndarray:
        """Returns (N,) float32 log-probs of the responses, nats; no gradient, up to `batch_size` rows at a time."""
        size = max(1, self.args.batch_size // self.world.size())
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        logprobs = np.zeros(len(rows), dtype=np.float32)
        training = self.model.training
        self.model.eval()
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            logprobs[chosen] = np.array(response_logprobs(self.model, *_padded([rows[i] for i in chosen])))
        self.model.train(training)
        return logprobs

    # -- loss

    def loss(
        self,
        model: nn.Module,
        ids: mx.array,
        lengths: mx.array,
        ref_logprobs: mx.array,
        rewards: mx.array,
        group_ids: mx.array,
        share: mx.array,
        value: mx.array | None,
        coefficients: mx.array | None,
        count: mx.array,
    ) -> tuple[mx.array, mx.array]:
        """Returns (loss, count) of a micro-batch: value, GVPO's loss; gradient, the step at policy-gradient scale."""
        logprobs = response_logprobs(model, ids, lengths)
        if coefficients is None:
            rows = (logprobs, ref_logprobs, rewards, group_ids)
            surrogate = gvpo_surrogate(*rows, beta=self.beta, num_groups=ids.shape[0])
            value = mx.stop_gradient(gvpo_loss(*rows, beta=self.beta, num_groups=ids.shape[0]).loss)
        else:
            surrogate = -mx.sum(coefficients * logprobs)
        return share * (value + surrogate - mx.stop_gradient(surrogate)), count

    def _arrays(
        self,
        groups: Sequence[Group],
        part: list[StepResponse],
        *,
        share: float,
        scored: tuple[float, list[float]] | None = None,
    ) -> tuple[Any, ...]:
        """Returns the arguments of `loss` after the model. An empty micro-batch gets one row that does not count.

        Args:
          scored: loss and coefficients of rows that were scored before; None: `loss` computes them.
        """
        empty = not part
        part = part or [StepResponse(0, 0)]
        rows = [(groups[row.group], row.response) for row in part]
        ids, lengths = _padded([(group.prompt, group.responses[i]) for group, i in rows])
        rewards = [float("nan") if empty else group.rewards[i] for group, i in rows]
        count = 0 if empty else sum(len(group.responses[i]) for group, i in rows)
        value = coefficients = None
        if scored is not None:
            value, coefficients = mx.array(scored[0]), mx.array([0.0] if empty else scored[1])
        return (
            ids,
            lengths,
            mx.array([group.reference(i) for group, i in rows]),
            mx.array(rewards),
            mx.array(np.unique([row.group for row in part], return_inverse=True)[1].astype(np.int32)),
            mx.array(share),
            value,
            coefficients,
            mx.array(count),
        )


def response_logprobs(model: nn.Module, ids: mx.array, lengths: mx.array) -> mx.array:
    """Returns (N,) float32, nats, at temperature 1: sums over each row's response tokens, including its end token.

    Args:
      ids: (N, T) prompt and response, padded on the right.
      lengths: (N, 2) tokens of the prompt, and of prompt and response.
    """
    logits = model(ids[:, :-1]).astype(mx.float32)
    targets = ids[:, 1:]
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - logsumexp(logits)
    place = mx.arange(1, ids.shape[1])
    inside = (place >= lengths[:, :1]) & (place < lengths[:, 1:])
    return mx.where(inside, chosen, 0.0).sum(axis=1)


def _padded(rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[mx.array, mx.array]:
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = np.zeros((len(rows), 1 + _BLOCK * -(-(longest - 1) // _BLOCK)), dtype=np.int32)
    for place, (prompt, response) in zip(ids, rows, strict=True):
        place[: len(prompt) + len(response)] = prompt + response
    return mx.array(ids), mx.array([(len(prompt), len(prompt) + len(response)) for prompt, response in rows])
