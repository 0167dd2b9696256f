"""The reference policy: a NumPy softmax table over enumerable responses, exact in float64, small enough to read.

It is the first test of the training loop, because pi, KL and pi* are known exactly. A prompt is one token: its index.
A response is two tokens: 1 + its index among all responses, then the end token 0.
"""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.config.backends import refuse_settings
from gvpo_core.training.files.disk import refuse_special, retried, write_synced
from gvpo_core.training.policy import (
    Batch,
    Coefficients,
    Mask,
    PolicyFacts,
    PolicySettings,
    Prompt,
    Response,
    ResponseError,
    Tokens,
    Update,
)
from gvpo_core.training.policy.segments import summed
from gvpo_core.training.policy.step import learning_rate
from gvpo_core.training.policy.text import checked_response
from gvpo_core.training.sampling import Sampling, uniforms

_ONE_TURN = "a table draws a response at once, so it has no context tokens: its mask must not contain False"


class TablePolicy:
    """pi(y|x) = softmax(logits[x])_y over the responses listed for prompt x. Steps by plain gradient descent."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        table: Mapping[str, Mapping[str, float]],
        optimizer: OptimizerConfig | None = None,
        *,
        updates: int = 0,
        model: ModelConfig | None = None,
    ) -> None:
        """Args:
        table: prompt -> response -> initial probability, each > 0; normalised for each prompt.
        updates: optimizer steps of the whole run, for the schedule.
        model: settings that the table was loaded with, if any.
        """
        self.prompts = list(table)
        self.responses = list(dict.fromkeys(response for row in table.values() for response in row))
        self.logits = np.full((len(self.prompts), len(self.responses)), -np.inf)
        for x, row in enumerate(table.values()):
            p = np.asarray(list(row.values()), dtype=np.float64)
            if not (p > 0).all():
                raise ValueError(f"the table gives {self.prompts[x]!r} a probability that is not > 0")
            self.logits[x, [self.responses.index(response) for response in row]] = np.log(p / p.sum())
        self.initial, self.reference = self.logits, self.log_table()
        self.optimizer = optimizer or OptimizerConfig()
        self.updates = updates
        self.update_count = 0
        self.settings = PolicySettings(self.optimizer, updates, reference=True, seed=0, model=model)

    @property
    def steps_taken(self) -> int:
        """See `Policy.steps_taken`."""
        return self.update_count

    def reset(self) -> None:
        """See `Policy.reset`."""
        self.logits, self.update_count = self.initial, 0
        self.reference = self.log_table()

    def log_table(self) -> np.ndarray:
        """(P, Y) float64: log pi(y|x); -inf if prompt x does not list response y."""
        largest = self.logits.max(axis=1, keepdims=True)
        shifted = self.logits - largest
        result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return result

    def encode(self, prompt: Prompt) -> Tokens:
        """See `Policy.encode`."""
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        if text not in self.prompts:
            raise ValueError(f"the table has no prompt {text!r}; it has {len(self.prompts)} others")
        return (self.prompts.index(text),)

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Policy.decode`."""
        return self.responses[tokens[0] - 1]

    def prompt_text(self, tokens: Sequence[int]) -> str:
        """See `Policy.prompt_text`."""
        return self.prompts[tokens[0]]

    def encode_responses(
        self,
        prompt: Prompt,
        responses: Sequence[str | Sequence[int]],
        finished: Sequence[bool | None],
        masks: Sequence[Mask | None] | None = None,
    ) -> list[Response]:
        """See `Policy.encode_responses`."""
        encoded = []
        masks = [None] * len(responses) if masks is None else masks
        for number, (response, ended, mask) in enumerate(zip(responses, finished, masks, strict=True)):
            try:
                if mask is not None and not all(mask):
                    raise ValueError(_ONE_TURN)
                if isinstance(response, str) and response not in self.responses:
                    raise ValueError(f"the table has no response {response!r}; it has {len(self.responses)} others")
                if isinstance(response, str):
                    tokens = [1 + self.responses.index(response), *([] if ended is False else [0])]
                else:
                    tokens = [int(i) for i in response]
                    if tokens and (not 0 < tokens[0] <= len(self.responses) or len(tokens) > 2):
                        raise ValueError(f"the token ids {tokens} are not a response of the table")
                encoded.append(checked_response(tokens, ended, (0,)))
            except ValueError as error:
                raise ResponseError(str(error), number) from error
        return encoded

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        """See `Policy.generate`."""
        if sampling.top_p < 1 or sampling.top_k or sampling.min_p:
            raise ConfigError(
                "the table samples complete distributions; it does not support rollout.top_p, top_k or min_p"
            )
        log_pi = self.log_table()
        result = []
        for (x,), row_seeds in zip(prompts, seeds, strict=True):
            if sampling.temperature == 0:
                choices = [int(log_pi[x].argmax())] * len(row_seeds)
            else:
                tilted = np.exp((log_pi[x] - log_pi[x].max()) / sampling.temperature)
                cumulative = np.cumsum(tilted)
                choices = [
                    int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
                    for u in uniforms(row_seeds, 0, 1)[:, 0]
                ]
            full = sampling.max_tokens >= 2
            result.append([Response((1 + y, 0) if full else (1 + y,), full) for y in choices])
        return result

    def logprobs(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """See `Policy.logprobs`."""
        table = self.reference if reference else self.log_table()
        rows, owners = batch.by_segment()
        return summed(table[_cells(rows)], owners, len(batch))

    def renew_reference(self) -> None:
        """See `Policy.renew_reference`."""
        self.reference = self.log_table()

    def update(self, batch: Batch, coefficients: Coefficients, *, scored: np.ndarray | None = None) -> Update:
        """See `Policy.update`."""
        logprobs = self.logprobs(batch) if scored is None else scored
        rows, owners = batch.by_segment()
        c = np.asarray(coefficients(logprobs, np.arange(len(batch))))[owners]
        x, y = _cells(rows)
        gradient = np.zeros_like(self.logits)
        np.add.at(gradient, (x, y), -c)
        gradient += np.exp(self.log_table()) * np.bincount(x, weights=c, minlength=len(self.prompts))[:, None]
        norm = float(np.sqrt((gradient**2).sum()))
        if not np.isfinite(norm):
            raise FloatingPointError("the gradient is not finite; parameters are unchanged")
        limit = self.optimizer.max_gradient_norm
        scale = limit / norm if limit and norm > limit else 1.0
        rate = learning_rate(self.optimizer, self.update_count, self.updates)
        self.logits = self.logits - rate * scale * gradient
        self.update_count += 1
        return Update(logprobs, norm, rate, 3 * len(rows), self.logits.nbytes)

    def save(self, directory: Path) -> None:
        """See `Policy.save`."""
        path = directory / "table.npz"
        np.savez(path, logits=self.logits, reference=self.reference, update_count=self.update_count)

    def restore(self, directory: Path) -> None:
        """See `Policy.restore`."""
        path = directory / "table.npz"
        try:
            with np.load(BytesIO(retried(path.read_bytes)), allow_pickle=False) as saved:
                logits, reference = saved["logits"], saved["reference"]
                update_count = int(saved["update_count"])
        except (EOFError, ValueError, KeyError, TypeError, BadZipFile) as e:
            raise ConfigError(f"{path} does not hold a table of numbers: {type(e).__name__}: {e}") from e
        if not logits.shape == reference.shape == self.logits.shape:
            raise ConfigError(f"{directory} holds a table {logits.shape}; expected {self.logits.shape}")
        self.logits, self.reference, self.update_count = logits, reference, update_count

    def save_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        if self.rank == 0:
            self.save(directory)

    def load_parameters(self, directory: Path) -> None:
        """See `Policy.save`."""
        self.restore(directory)

    def export(self, directory: Path, *, own_head: bool = False) -> None:
        """Writes table.json, which `load` reads. A table has no Hugging Face format, and no head."""
        pi = np.exp(self.log_table())
        table = {
            p: {r: float(pi[x, y]) for y, r in enumerate(self.responses) if pi[x, y] > 0}
            for x, p in enumerate(self.prompts)
        }
        write_synced(directory / "table.json", json.dumps(table, indent=1).encode())

    def export_adapters(self, directory: Path) -> None:
        """See `Policy.export_adapters`."""
        raise ConfigError("a table has no adapters")

    def describe(self) -> PolicyFacts:
        """See `Policy.describe`."""
        count = int(np.isfinite(self.logits).sum())
        return PolicyFacts(backend="table", device="cpu", dtype="float64", parameters=count, trainable_parameters=count)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """See `Policy.gather`."""
        return values


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> TablePolicy:
    """Loads the table in `model.path`/table.json: prompt -> response -> probability under the initial policy.

    Raises: ConfigError: settings of another backend, or an invalid file.
    """
    refuse_settings(model, "table", optimizer)
    path = Path(model.path) / "table.json"
    try:
        refuse_special(path)
        table = json.loads(path.read_text(encoding="utf-8"))
        return TablePolicy(table, optimizer, updates=updates, model=model)
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise ConfigError(f"model.path = {model.path!r}: no table can be read from {path}: {e}") from e


def _cells(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    if not all(mask is None or all(mask) for mask in batch.masks or ()):
        raise ValueError(_ONE_TURN)
    return np.asarray([p[0] for p in batch.prompts], int), np.asarray([r[0] - 1 for r in batch.responses], int)
