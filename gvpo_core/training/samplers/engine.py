"""An inference engine behind HTTP as the sampler: completions with token ids in and out, or with text."""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gvpo_core.training.config import ConfigError, EngineConfig
from gvpo_core.training.config.engine import wrong_engine
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.http import Clock, Failed, Server
from gvpo_core.training.samplers.protocol import Drawn, SamplerError
from gvpo_core.training.samplers.weights import WeightFolder
from gvpo_core.training.samplers.workers import Workers
from gvpo_core.training.sampling import Sampling


@dataclass
class _Asked:
    """Requests of one step."""

    served: str  # name to ask for
    version: int | None  # of the weights under that name
    clock: Clock
    failures: list[str] = field(default_factory=list)
    work: list[list["Future[list[Drawn]]"]] = field(default_factory=list)  # requests of each prompt


class Engine:
    """Draws responses from POST {url}/v1/completions, one request a prompt.

    A request that fails (refused, too slow, 429, 5xx, an answer that is not JSON or of another model) is repeated
    with growing pauses. Responses that do not come are lost, and their groups are smaller.

    Without `weights` the engine keeps those that it was started with.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        weights: Literal["kept", "adapters", "model"] = "kept",
        folder: str | Path = "",
        gap_tolerance: float | None = None,
        concurrency: int = 16,
        deadline: float = 600.0,
        tries: int = 4,
        pause: float = 0.5,
        api_key: str = "",
    ) -> None:
        """
        Args:
          url: of the server, without /v1.
          model: its name there.
          weights: what `refresh` sends to vLLM's server before each step. adapters: the policy's LoRA adapters; model:
            the whole model, whose head must not be its embedding.
          folder: for the weights; the server sees it under the same path. The versions in use and the one before stay.
          gap_tolerance: largest difference to the policy's log-probabilities, nats a token. None: not checked.
          concurrency: requests at a time.
          deadline: seconds that the responses of one step may take; later ones are lost.
          tries: requests for a prompt, the first one included.
          pause: seconds before the second try; twice as long before each further one.
          api_key: "$NAME", the environment variable that holds the key of the server. The key is written nowhere.
        Raises: ConfigError: an argument out of range, or a variable that is not set.
        """
        given = EngineConfig(
            url, model, weights, str(folder), gap_tolerance, concurrency, deadline, tries, pause, api_key
        )
        if wrong := [message for _, message in wrong_engine(given)]:
            raise ConfigError("\n".join(wrong))
        self.url, self.model, self.deadline, self.gap_tolerance = url.rstrip("/"), model, deadline, gap_tolerance
        self.weights = weights
        self.served = model  # name to ask for: each version of adapters has its own
        self.version: int | None = None  # of the engine's weights: steps taken
        self.failures: list[str] = []  # why responses of the newest `generate` were lost
        self._server = Server(url, tries=tries, pause=pause, api_key=api_key)
        self._concurrency = concurrency
        self._workers: Workers[list[Drawn]] | None = None
        self._asked: list[_Asked] = []  # whose responses nobody has taken yet
        self._weights = None if weights == "kept" else WeightFolder(Path(folder), adapters=weights == "adapters")

    def said(self) -> str:
        """What draws, for the header."""
        kept = "its own weights" if self.weights == "kept" else f"{self.weights} sent before each step"
        return f"{self.model} at {self.url}, {kept}"

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Drawn]]:
        """Draws up to `len(seeds[i])` responses to prompt i.

        A request has one seed, the first of its prompt; the engine derives those of the other responses.

        Raises: SamplerError: an answer without token ids.
        """
        return self.ask(prompts, seeds, sampling)()

    def ask(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> Callable[[], list[list[Drawn]]]:
        """Asks for responses with the weights of now, without waiting for them. Returns: what waits, and gives them."""
        self._workers = self._workers or Workers(self._concurrency)
        asked = _Asked(self.served, self.version, Clock(self.deadline))
        for prompt, own in zip(prompts, seeds, strict=True):
            task = partial(self._draw, asked, tuple(prompt), list(own), sampling)
            asked.work.append([self._workers.submit(task)])
        self._asked.append(asked)
        return partial(self._take, asked)

    def _take(self, asked: _Asked) -> list[list[Drawn]]:
        """Waits for responses until the deadline."""
        every = [future for of_prompt in asked.work for future in of_prompt]
        late = wait(every, timeout=asked.clock.left()).not_done if every else set()
        for future in late:
            future.cancel()
        if late:
            asked.failures.append(f"no answer within {self.deadline:g} s")
        self._asked.remove(asked)
        self.failures = asked.failures
        return [[r for future in own if future not in late for r in future.result()] for own in asked.work]

    def refresh(self, policy: Policy, version: int) -> None:
        """Sends the policy's weights, where `weights` says so and the engine lacks this version; every rank calls.

        Responses that were asked for before have the weights of before.

        Raises: SamplerError: the server did not load them, after all tries.
        """
        if self._weights is None or version == self.version:
            return
        if self.weights == "model":  # the server has one copy
            for asked in self._asked:
                wait([f for own in asked.work for f in own], timeout=asked.clock.left() if asked.work else 0)
        in_use = {asked.served for asked in self._asked}
        self.served = self._weights.send(policy, version, self.model, self._command, in_use)
        self.version = version

    def _command(self, path: str, body: dict[str, Any]) -> None:
        """POST of a command that has no answer but its status. Raises: SamplerError."""
        try:
            self._server.asked(path, body, time.monotonic() + self.deadline, lambda answer: None)
        except Failed as e:
            raise SamplerError(f"the weights were not loaded ({path}): {e}") from e

    def close(self) -> None:
        """Drops the requests that have not begun. A later run sends its weights anew."""
        if self._workers is not None:
            self._workers.close()
        self._workers, self._asked, self.version = None, [], None

    def _draw(self, asked: _Asked, prompt: Tokens, seeds: list[int], sampling: Sampling) -> list[Drawn]:
        body = {
            "model": asked.served,
            "prompt": list(prompt),
            "n": len(seeds),
            "seed": seeds[0] % 2**31,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": False,
        }
        read = partial(self._choices, asked)
        try:
            choices = self._server.asked("/v1/completions", body, asked.clock.start(), read)
        except Failed as e:
            asked.failures.append(str(e))
            return []
        drawn = [self._response(asked, choice) for choice in choices[: len(seeds)]]
        return [response for response in drawn if response is not None]

    def _choices(self, asked: _Asked, content: bytes) -> list[Any]:
        """The choices of an answer. Raises: Failed."""
        try:
            answer = json.loads(content)
        except ValueError as e:
            raise Failed(f"{self.url} answers no JSON: {e}", again=True) from e
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise Failed(f"{self.url} answers without choices", again=True)
        if answer.get("model", asked.served) != asked.served:
            raise Failed(f"{self.url} answers as the model {answer['model']!r}; asked for {asked.served!r}", again=True)
        choices: list[Any] = answer["choices"]
        return choices

    def _response(self, asked: _Asked, choice: dict[str, Any]) -> Drawn | None:
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list):
            raise SamplerError(
                f"{self.url} gives no token ids (return_token_ids): use a server that does, such as vLLM"
            )
        if reason not in ("stop", "length") or not ids:  # an aborted response was not cut by the limit
            asked.failures.append(f"{self.url} ended a response of {len(ids)} tokens with {reason!r}")
            return None
        tokens = (choice.get("logprobs") or {}).get("token_logprobs") or []
        known = len(tokens) == len(ids) and all(isinstance(x, int | float) for x in tokens)
        return Drawn(tuple(ids), reason == "stop", float(sum(tokens)) if known else float("nan"), asked.version)
