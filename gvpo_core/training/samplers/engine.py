"""An inference engine behind HTTP as the sampler: completions with token ids in and out, as vLLM's server has."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, TypeVar

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Policy
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.protocol import Drawn, SamplerError
from gvpo_core.training.samplers.weights import WeightFolder
from gvpo_core.training.sampling import Sampling

Result = TypeVar("Result")


class Failed(Exception):
    """A request without a usable answer."""

    def __init__(self, message: str, *, again: bool) -> None:
        super().__init__(message)
        self.again = again  # worth another try


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
        concurrency: int = 16,
        deadline: float = 600.0,
        tries: int = 4,
        pause: float = 0.5,
        end_tokens: Collection[int] = (),
        key_variable: str = "",
        gap_tolerance: float | None = None,
        weights: Literal["kept", "adapters", "model"] = "kept",
        folder: str | Path = "",
    ) -> None:
        """
        Args:
          url: of the server, without /v1.
          model: its name there.
          concurrency: requests at a time.
          deadline: seconds that the responses of one step may take; later ones are lost.
          tries: requests for a prompt, the first one included.
          pause: seconds before the second try; twice as long before each further one.
          end_tokens: where given, a response must end with one of them if and only if the engine says `stop`.
          key_variable: environment variable that holds the key of the server. The key is written nowhere.
          gap_tolerance: largest difference to the policy's log-probabilities, nats a token. None: not checked.
          weights: what `refresh` sends to vLLM's server before each step. adapters: the policy's LoRA adapters; model:
            the whole model, whose head must not be its embedding.
          folder: for the weights; the server sees it under the same path. The two newest versions are kept.
        Raises: ConfigError: an argument out of range, or a variable that is not set.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url = {url!r}; expected http://HOST:PORT or https://HOST")
        for name, good in (("concurrency", concurrency >= 1), ("tries", tries >= 1), ("deadline", deadline > 0)):
            if not good:
                raise ConfigError(f"{name} = {locals()[name]!r}; expected a number above 0")
        if key_variable and not os.environ.get(key_variable):
            raise ConfigError(f"key_variable = {key_variable!r}: this environment variable is not set")
        self.url, self.model, self.concurrency, self.deadline = url.rstrip("/"), model, concurrency, deadline
        self.tries, self.pause, self.end_tokens = tries, pause, frozenset(end_tokens)
        self.key_variable, self.gap_tolerance = key_variable, gap_tolerance
        if weights not in ("kept", "adapters", "model") or (weights != "kept") != bool(folder):
            raise ConfigError(
                f"weights = {weights!r} and folder = {str(folder)!r}; expected adapters or model, and a folder"
            )
        self.served = model  # name to ask for: each version of adapters has its own
        self._weights = None if weights == "kept" else WeightFolder(Path(folder), adapters=weights == "adapters")
        self.version: int | None = None  # of the engine's weights: steps taken
        self.failures: list[str] = []  # why responses of the newest `generate` were lost

    def generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Drawn]]:
        """Draws up to `len(seeds[i])` responses to prompt i.

        A request has one seed, the first of its prompt; the engine derives those of the other responses.

        Raises: SamplerError: an answer without token ids, or one that contradicts `end_tokens`.
        """
        self.failures = []
        until = time.monotonic() + self.deadline
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            work = [
                pool.submit(self._draw, tuple(prompt), list(own), sampling, until)
                for prompt, own in zip(prompts, seeds, strict=True)
            ]
            late = wait(work, timeout=self.deadline).not_done
            if late:
                self.failures.append(f"no answer within {self.deadline:g} s")
            return [[] if future in late else future.result() for future in work]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def refresh(self, policy: Policy, version: int) -> None:
        """Sends the policy's weights, where `weights` says so; every rank calls.

        Raises: SamplerError: the server did not load them, after all tries.
        """
        if self._weights is not None:
            self.served = self._weights.send(policy, version, self.model, self._command)
            self.version = version

    def _command(self, path: str, body: dict[str, Any]) -> None:
        """POST of a command that has no answer but its status. Raises: SamplerError."""
        until = time.monotonic() + self.deadline
        try:
            self._repeated(lambda: self._post(path, body, until), until)
        except Failed as e:
            raise SamplerError(f"the weights were not loaded ({path}): {e}") from e

    def _repeated(self, request: Callable[[], Result], until: float) -> Result:
        """The result of a request, tried again with growing pauses. Raises: Failed: of the last try."""
        number = 0
        while True:
            try:
                return request()
            except Failed as e:
                pause, number = self.pause * 2**number, number + 1
                if not e.again or number == self.tries or time.monotonic() + pause >= until:
                    raise
                time.sleep(pause)

    def close(self) -> None:
        """Does nothing: no connection stays open."""

    def _draw(self, prompt: Tokens, seeds: list[int], sampling: Sampling, until: float) -> list[Drawn]:
        body = {
            "model": self.served,
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
        try:
            choices = self._repeated(lambda: self._choices(self._post("/v1/completions", body, until)), until)
        except Failed as e:
            self.failures.append(str(e))
            return []
        drawn = [self._response(choice) for choice in choices[: len(seeds)]]
        return [response for response in drawn if response is not None]

    def _post(self, path: str, body: dict[str, Any], until: float) -> bytes:
        """The answer. Raises: Failed."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # another host never gets it
        try:
            with urllib.request.urlopen(request, timeout=max(until - time.monotonic(), 0.01)) as file:
                answer: bytes = file.read()
                return answer
        except urllib.error.HTTPError as e:
            text = e.read(300).decode("utf-8", "replace")
            said = text.replace(key, "***") if key else text
            raise Failed(f"{self.url} answers {e.code}: {said}", again=e.code == 429 or e.code >= 500) from e
        except (OSError, http.client.HTTPException) as e:  # refused, reset, too slow, ended within the answer
            raise Failed(f"{self.url}: {type(e).__name__}: {e}", again=True) from e

    def _choices(self, content: bytes) -> list[Any]:
        """The choices of an answer. Raises: Failed."""
        try:
            answer = json.loads(content)
        except ValueError as e:
            raise Failed(f"{self.url} answers no JSON: {e}", again=True) from e
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise Failed(f"{self.url} answers without choices", again=True)
        if answer.get("model", self.served) != self.served:
            raise Failed(f"{self.url} answers as the model {answer['model']!r}; asked for {self.served!r}", again=True)
        choices: list[Any] = answer["choices"]
        return choices

    def _response(self, choice: dict[str, Any]) -> Drawn | None:
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list):
            raise SamplerError(
                f"{self.url} gives no token ids (return_token_ids): use a server that does, such as vLLM"
            )
        if reason not in ("stop", "length") or not ids:  # an aborted response was not cut by the limit
            self.failures.append(f"{self.url} ended a response of {len(ids)} tokens with {reason!r}")
            return None
        if self.end_tokens and (ids[-1] in self.end_tokens) != (reason == "stop"):
            raise SamplerError(
                f"{self.url} ended a response with {reason!r} and the token {ids[-1]}; the end tokens are"
                f" {sorted(self.end_tokens)}"
            )
        tokens = (choice.get("logprobs") or {}).get("token_logprobs") or []
        known = len(tokens) == len(ids) and all(isinstance(x, int | float) for x in tokens)
        return Drawn(tuple(ids), reason == "stop", float(sum(tokens)) if known else float("nan"), self.version)
