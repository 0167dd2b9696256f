"""Trains a reward model on preference pairs with the Bradley-Terry loss (Eq. 4).

A reward model is a decoder with one output at the last token, like transformers' *ForSequenceClassification. The
built-in reward `reward_model` and transformers load what `save` writes.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gvpo_core import bradley_terry_loss
from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.files.disk import make_synced, sync_folder, sync_tree
from gvpo_core.training.policy import Tokens, hugging_face, weight_files
from gvpo_core.training.policy.layout import rope_by_length
from gvpo_core.training.policy.step import learning_rate
from gvpo_core.training.rewards.worker.reward_model import row_ids
from gvpo_torch.model import train_padding_row
from gvpo_torch.ranks import Ranks
from gvpo_torch.update import clip, make_optimizer, step
from gvpo_torch.weights import without_bars

TOLERANCE = 1e-3  # largest relative difference between a row's score in a padded batch and alone, in float32
_HEAD = "score"  # transformers' name for the output layer of decoders


@dataclass(frozen=True)
class Pair:
    """Two rows of prompt and response as tokens: the preferred one and the other."""

    chosen: Tokens
    rejected: Tokens
    margin: float = 0.0  # smallest amount by which the score of `chosen` should be higher

    @property
    def width(self) -> int:
        """Tokens of the longer row."""
        return max(len(self.chosen), len(self.rejected))


class RewardModel:
    """A decoder with one output at the last token of a row."""

    def __init__(self, config: ModelConfig, *, seed: int = 0) -> None:
        """Loads the model in float32. A new output layer starts with zeros: all scores are then 0, the loss log 2.

        Args:
          config: path, revision, device, and the dtype of products.
        Raises: ConfigError: a model or device that cannot be used; weights that are quantised or not in safetensors.
        """
        ranks = Ranks(config)
        if ranks.world_size > 1:
            raise ConfigError("train-reward runs in one process: start it without torchrun")
        self.device, self.config = ranks.device, config
        torch.manual_seed(seed)
        self.folder = hugging_face.local_folder(config)
        self.tokenizer: Any = hugging_face.load_tokenizer(config)
        values = hugging_face.read_json(self.folder / "config.json")
        weight_files.refuse_quantization(values, "gvpo train-reward")
        weight_files.check_settings(values, self.folder)
        weight_files.refuse_integers(weight_files.tensors(self.folder))
        with hugging_face.explained("the model", config), without_bars(self.folder), _without_report():
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                **hugging_face.located(config),
                num_labels=1,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        head, missing = getattr(model, _HEAD, None), set(loaded["missing_keys"])
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise ConfigError(
                f"model.path {config.path!r} is a {type(model).__name__} without an output layer {_HEAD!r} of one"
                " output; expected a decoder that transformers has as *ForSequenceClassification"
            )
        if lacking := sorted(missing - {f"{_HEAD}.weight"}):
            raise ConfigError(f"the files of {config.path!r} lack {', '.join(lacking[:3])}")
        if missing:
            nn.init.zeros_(head.weight)
        train_padding_row(model)
        self.model: Any = model.to(self.device).eval()  # without dropout
        text = hugging_face.text_config(model.config.to_dict())
        self.context = hugging_face.context(text)
        if (rope := rope_by_length(text)) is not None:  # beyond it the longest row sets all frequencies
            self.context = min(self.context or rope.original, rope.original)

    def ids(self, prompt: Any, response: str) -> Tokens:
        """Returns the tokens of a row, as the built-in reward `reward_model` reads it."""
        completion = response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]
        return tuple(row_ids(self.tokenizer, prompt, completion))

    def scores(self, rows: Sequence[Tokens]) -> Tensor:
        """Returns (n,) float32. Rows are padded on the right; each score is read at the row's own last token."""
        width = max(map(len, rows))
        ids, attention_mask = torch.zeros((2, len(rows), width), dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            attention_mask[number, : len(row)] = 1
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.compute_dtype == "bfloat16"):
            states = self.model.base_model(input_ids=ids.to(self.device), attention_mask=attention_mask.to(self.device))
            hidden = states.last_hidden_state[torch.arange(len(rows), device=self.device), last]
            scores: Tensor = self.model.get_submodule(_HEAD)(hidden)
        return scores.float()[:, 0]

    @torch.no_grad()
    def check(self, rows: Sequence[Tokens]) -> None:
        """Compares scores of padded rows with those that transformers gives to each row alone.

        Raises: ConfigError: they differ.
        """
        head, text = self.model.get_submodule(_HEAD).weight, self.model.config.get_text_config()
        head_values, pad_token_id = head.clone(), text.pad_token_id
        nn.init.normal_(head)  # a head of zeros would hide differences
        text.pad_token_id = -1  # a row alone has no padding, and its last token may be the padding token
        try:
            together = self.scores(rows)
            alone = [self.model(input_ids=torch.tensor([row], device=self.device)).logits[0, 0] for row in rows]
        finally:
            head.copy_(head_values)
            text.pad_token_id = pad_token_id
        worst = float((together - torch.stack(alone).float()).abs().max() / (1 + together.abs().max()))
        if self.config.compute_dtype == "float32" and not worst <= TOLERANCE:
            raise ConfigError(
                f"{type(self.model).__name__}: a row's score depends on the rows beside it (by {worst:.2g}), so it"
                " cannot be trained in batches; use another model"
            )

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair], tokens: int) -> tuple[float, float]:
        """Returns the loss of Eq. 4, nats, and the share of pairs in the right order; a tie counts half."""
        losses, right = 0.0, 0.0
        for part in micro_batches(pairs, tokens):
            margins = self._margins(part)
            losses += float(bradley_terry_loss(margins, torch.zeros_like(margins))) * len(part)
            right += float(((margins > 0).float() + (margins == 0).float() / 2).sum())
        return losses / len(pairs), right / len(pairs)

    def backward(self, pairs: Sequence[Pair], tokens: int) -> float:
        """Adds the gradient of the mean loss over the pairs, in micro-batches. Returns: the loss, nats."""
        total = 0.0
        for part in micro_batches(pairs, tokens):
            margins = self._margins(part)
            target_margins = torch.tensor([pair.margin for pair in part], device=self.device)
            loss = bradley_terry_loss(margins - target_margins, torch.zeros_like(margins)) * (len(part) / len(pairs))
            loss.backward()
            total += float(loss.detach())
        return total

    def _margins(self, pairs: Sequence[Pair]) -> Tensor:
        scores = self.scores([row for pair in pairs for row in (pair.chosen, pair.rejected)])
        return scores[0::2] - scores[1::2]

    def save(self, folder: Path) -> None:
        """Writes a folder that transformers loads. The folder appears only when it is complete."""
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)  # left by a save that was killed
        make_synced(folder.parent)
        try:
            with without_bars(self.folder):
                self.model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(**hugging_face.located(self.config)).save_pretrained(partial)
            sync_tree(partial)
            partial.rename(folder)
        except BaseException:  # Ctrl-C or a full disk: leave no gigabytes behind under a hidden name
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder.parent)


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Hides transformers' table of missing and unused weights: `RewardModel` names those that matter."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def micro_batches(pairs: Sequence[Pair], tokens: int) -> Iterator[list[Pair]]:
    """Splits the pairs, longest first, into parts of at most `tokens` tokens with padding. A longer pair is alone."""
    part: list[Pair] = []
    for pair in sorted(pairs, key=lambda pair: pair.width, reverse=True):
        if part and 2 * part[0].width * (len(part) + 1) > tokens:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def train(
    model: RewardModel, pairs: Sequence[Pair], optimizer: OptimizerConfig, *, batch: int, epochs: int, seed: int = 0
) -> Iterator[tuple[int, float, float]]:
    """Trains with AdamW on the pairs, in a new random order each epoch.

    Args:
      batch: pairs per step; the last step of an epoch has the rest.
      optimizer: its `micro_batch_tokens` limits the tokens of a forward pass.
    Yields: after each step its number, from 1, the loss before it, nats, and the gradient's norm before clipping.
    Raises: FloatingPointError: a gradient that is not finite.
    """
    updates, done = epochs * -(-len(pairs) // batch), 0
    adamw = make_optimizer(model.model, optimizer)
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(pairs))
        for start in range(0, len(pairs), batch):
            chosen = [pairs[i] for i in order[start : start + batch]]
            loss = model.backward(chosen, optimizer.micro_batch_tokens)
            norm = clip(model.model.named_parameters(), optimizer.max_gradient_norm)
            step(adamw, learning_rate(optimizer, done, updates))
            done += 1
            yield done, loss, norm
