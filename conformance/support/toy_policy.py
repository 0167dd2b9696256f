"""A fourth backend for tests alone: a bigram model in NumPy, written from docs/new_backend.md.

pi(token | the token before it) = softmax(weights[before]). Its folder has config.json with the characters of the
vocabulary, id 0 being the end token, and weights.npy, (V, V) float64 logits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Batch, Coefficients, PolicyFacts, Response, Tokens, Update
from gvpo_core.training.policy.base import LanguageModelPolicy, OneRank
from gvpo_core.training.policy.checkpoint import check_files, check_tensors, write_header
from gvpo_core.training.policy.export import write_json
from gvpo_core.training.policy.hugging_face import read_json
from gvpo_core.training.policy.step import StepPlan, check_finite, factors_of
from gvpo_core.training.sampling import Sampling, uniforms


def load(model: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int) -> "ToyPolicy":
    """A bigram model's folder as a policy. Raises: ConfigError: a folder or setting that cannot be used."""
    return ToyPolicy(model, optimizer, updates=updates, reference=reference, seed=seed)


class Characters:
    """A tokenizer of one character a token; what `policy.text` asks of one."""

    chat_template = None
    bos_token_id = pad_token_id = None
    eos_token_id = 0

    def __init__(self, characters: str) -> None:
        self.characters = characters

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.characters.index(c) for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.characters[i] for i in ids)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.characters[i] for i in ids]


class ToyPolicy(LanguageModelPolicy):
    """See `gvpo_core.training.policy.Policy`."""

    backend = "toy"
    architecture = "Bigram"

    def __init__(
        self, config: ModelConfig, optimizer: OptimizerConfig, *, updates: int, reference: bool, seed: int
    ) -> None:
        super().__init__(config, optimizer, OneRank, updates=updates, reference=reference, seed=seed)
        self._load()

    def _read_tokenizer(self) -> None:
        self.folder = Path(self.config.path)
        if not (self.folder / "weights.npy").is_file():
            raise ConfigError(f"model.path {self.config.path!r} has no weights.npy: expected a bigram model")
        self.tokenizer = Characters(read_json(self.folder / "config.json")["characters"])
        self._end = [0]

    def _initial(self) -> np.ndarray:
        return np.load(self.folder / "weights.npy", allow_pickle=False)

    def _load(self) -> None:
        self.weights = self._initial()
        self.reference = self.weights.copy()
        self.moments = np.zeros((2, *self.weights.shape))
        self.packed, self.layout_reason = False, "a response costs no more than its own tokens"
        self._splitting = self._split(hidden=len(self.weights))

    def _unload(self) -> None:
        del self.weights, self.reference, self.moments

    # -- sampling and scoring

    def _generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        if sampling.top_p < 1 or sampling.top_k or sampling.min_p:
            raise ConfigError("the toy samples whole distributions; leave out rollout.top_p, top_k and min_p")
        return [[self._draw(p[-1], s, sampling) for s in row] for p, row in zip(prompts, seeds, strict=True)]

    def _draw(self, last: int, seed: int, sampling: Sampling) -> Response:
        tokens: list[int] = []
        for u in uniforms([seed], 0, sampling.max_tokens)[0]:
            z = self.weights[last]
            if sampling.temperature:
                cumulative = np.cumsum(np.exp((z - z.max()) / sampling.temperature))
                last = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
            else:
                last = int(z.argmax())
            tokens.append(last)
            if last in self._end:
                break
        return Response(tuple(tokens), tokens[-1] in self._end)

    def _logprobs(self, batch: Batch, reference: bool = False) -> tuple[np.ndarray, int]:
        table = _log_softmax(self.reference if reference else self.weights)
        pairs = _pairs(batch)
        return np.asarray([table[before, after].sum() for before, after in pairs]), sum(len(b) for b, _ in pairs)

    def _renew_reference(self) -> None:
        self.reference = self.weights.copy()

    # -- training

    def _update(self, batch: Batch, plan: StepPlan, coefficients: Coefficients, rate: float) -> Update:
        logprobs, factors, tokens = plan.logprobs.copy(), plan.factors.copy(), plan.tokens
        for rows in plan.grouped:
            members = np.asarray([i for row in rows for i in row.responses])
            logprobs[members], computed = self._logprobs(batch.take(members.tolist()))
            factors[members] = factors_of(coefficients, logprobs[members], members)
            tokens += computed
        gradient = np.zeros_like(self.weights)  # of -sum_i c_i log pi_i
        pi = np.exp(_log_softmax(self.weights))
        for pairs, factor in zip(_pairs(batch), factors, strict=True):
            for before, after in zip(*pairs, strict=True):
                gradient[before] += factor * pi[before]
                gradient[before, after] -= factor
        norm = float(np.sqrt((gradient**2).sum()))
        check_finite("gradients", np.asarray([norm]), np.arange(1))
        c = self.optimizer_config
        if c.max_gradient_norm and norm > c.max_gradient_norm:
            gradient *= c.max_gradient_norm / norm
        betas, t = np.asarray(c.betas), self.steps_taken + 1
        for moment, beta, value in zip(self.moments, betas, (gradient, gradient**2), strict=True):
            moment[...] = beta * moment + (1 - beta) * value
        first, second = self.moments / (1 - betas**t)[:, None, None]
        self.weights = (1 - rate * c.weight_decay) * self.weights - rate * first / (np.sqrt(second) + c.eps)
        return Update(logprobs, norm, rate, tokens, self.weights.nbytes * 4)

    # -- on disk

    def _save(self, directory: Path, header: dict[str, Any]) -> None:
        reference = {"reference": self.reference} if self.renewed else {}
        np.savez(directory / "arrays.npz", weights=self.weights, moments=self.moments, **reference)
        write_header(directory, header)

    def _restore(self, directory: Path, header: dict[str, Any]) -> None:
        check_files(directory, ["arrays.npz"])
        with np.load(directory / "arrays.npz", allow_pickle=False) as saved:
            arrays = dict(saved)
        wanted = {"weights": self.weights.shape, "moments": self.moments.shape}
        wanted |= {"reference": self.weights.shape} if header.get("renewed") else {}
        check_tensors(directory, wanted, {name: array.shape for name, array in arrays.items()})
        self.weights, self.moments = arrays["weights"], arrays["moments"]
        self.reference = arrays["reference"] if "reference" in arrays else self._initial()

    def export(self, directory: Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / "config.json", {"characters": self.tokenizer.characters})
        np.save(Path(directory) / "weights.npy", self.weights)

    def describe(self) -> PolicyFacts:
        return self._describe(
            device="cpu",
            device_name="NumPy",
            model={},
            vocabulary=len(self.weights),
            parameters=self.weights.size,
            trainable_parameters=self.weights.size,
            packages=("numpy",),
            memory=None,
        )


def _pairs(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each response, the token before each own token, and these tokens."""
    pairs = []
    for i, (prompt, response) in enumerate(zip(batch.prompts, batch.responses, strict=True)):
        mask = None if batch.masks is None else batch.masks[i]
        own = slice(None) if mask is None else np.asarray(mask)
        pairs.append((np.asarray((prompt[-1], *response[:-1]))[own], np.asarray(response)[own]))
    return pairs


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    shifted: np.ndarray = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return shifted
