"""A teacher behind an OpenAI-compatible server that echoes the log-probabilities of a prompt, as vLLM does.

The tokenizer is loaded here. The server gets token ids, and returns the log-probability of each.
"""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from functools import partial
from typing import Any

import numpy as np

from gvpo_core.training.config import ConfigError, ModelConfig, TeacherConfig
from gvpo_core.training.policy import Batch, Prompt, Response, hugging_face, text
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers import SamplerError
from gvpo_core.training.samplers.completions import read_answer
from gvpo_core.training.samplers.http import Clock, Failed, Server
from gvpo_core.training.samplers.workers import Workers

_CHECK = "2 + 2 = 4"  # any text of several tokens
_CHECK_SECONDS = 60.0
_MOST_NAMED = 3  # most failures in an error message


class ServedTeacher:
    """Scores tokens by POST {url}/v1/completions with echo, one request per response."""

    def __init__(self, teacher: TeacherConfig, model: ModelConfig) -> None:
        """
        Args:
          model: the model to read the tokenizer and the context from, without its weights.
        Raises: ConfigError: there is no tokenizer, or an environment variable is not set.
        """
        self.url, self.model, self.config = teacher.url.rstrip("/"), teacher.model or teacher.path, model
        self._deadline, self._concurrency = teacher.deadline, teacher.concurrency
        self._server = Server(
            teacher.url, tries=teacher.tries, pause=teacher.pause, api_key=teacher.api_key, section="teacher"
        )
        folder = hugging_face.local_folder(model)
        self.tokenizer = hugging_face.load_tokenizer(model)
        self.context = hugging_face.context(hugging_face.text_config(hugging_face.read_json(folder / "config.json")))
        self._end = text.end_tokens(hugging_face.generation_eos(folder), self.tokenizer)

    def encode(self, prompt: Prompt) -> Tokens:
        """Token ids of a text, or of chat messages through the chat template; see `policy.text`."""
        return text.encode(self.tokenizer, prompt, self.config)

    def encode_responses(
        self, prompt: Prompt, responses: Sequence[str], finished: Sequence[bool | None]
    ) -> list[Response]:
        """Encodes texts as the teacher would have drawn them; see `policy.text`."""
        return text.encode_responses(self.tokenizer, prompt, responses, finished, self._end)

    def logprobs(self, batch: Batch) -> np.ndarray:
        """(N,) float64 sums over each response's tokens, nats; NaN if no score arrived within the deadline.

        Raises: SamplerError: no score arrived at all, or the server scored different tokens. Stopped: the run was asked
          to stop while the server was away.
        """
        if not len(batch):
            return np.zeros(0)
        clock, workers = Clock(self._deadline), Workers[float](min(self._concurrency, len(batch)))
        rows = zip(batch.prompts, batch.responses, strict=True)
        work = [workers.submit(partial(self._score, prompt, response, clock)) for prompt, response in rows]
        clock.start()
        done = wait(work, timeout=clock.left()).done
        workers.close()
        scores, failures = np.full(len(batch), np.nan), dict[str, None]()
        for place, future in enumerate(work):
            if future not in done or future.cancelled():
                failures.setdefault(f"no answer within teacher.deadline = {self._deadline:g} s")
                continue
            try:
                scores[place] = future.result()
            except Failed as error:
                failures.setdefault(str(error))
        if np.isnan(scores).all():
            reasons = "; ".join([*failures][:_MOST_NAMED])
            raise SamplerError(f"the teacher scored none of {len(batch)} responses: {reasons}")
        return scores

    @property
    def stopping(self) -> Callable[[], bool]:
        """Returns whether the run was asked to stop. Then the client no longer waits for a server that is away."""
        return self._server.stopping

    @stopping.setter
    def stopping(self, stopping: Callable[[], bool]) -> None:
        self._server.stopping = stopping

    def check(self) -> None:
        """Scores a test text. Raises: ConfigError: the server cannot score it."""
        ids = self.tokenizer.encode(_CHECK, add_special_tokens=False)
        clock = Clock(_CHECK_SECONDS)
        clock.start()
        try:
            self._score(tuple(ids[:1]), tuple(ids[1:]), clock)
        except (Failed, SamplerError) as error:
            raise ConfigError(str(error)) from error

    def _score(self, prompt: Tokens, response: Tokens, clock: Clock) -> float:
        ids = [*map(int, prompt), *map(int, response)]
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 0,
            "echo": True,
            "logprobs": 0,
            "temperature": 1.0,
            "add_special_tokens": False,
            "return_token_ids": True,
            "stream": False,
        }
        read = partial(read_scores, ids=ids, start=len(prompt), model=self.model, url=self.url)
        return self._server.request("/v1/completions", body, clock.start(), read)


def read_scores(content: bytes, ids: Sequence[int], start: int, model: str, url: str) -> float:
    """Returns the sum of the log-probabilities of ids[start:], nats.

    Raises: Failed: there is no usable answer. SamplerError: the server does not echo, or read different tokens.
    """
    choice: dict[str, Any] = next(iter(read_answer(content, model, url)["choices"]), {})
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(logprobs, list) or len(logprobs) < len(ids):
        shown = "no" if not logprobs else str(len(logprobs))
        raise SamplerError(
            f"{url} gives {shown} log-probabilities for {len(ids)} tokens: expected one for each token of the prompt"
            ' ("echo" with "logprobs"), as vLLM gives'
        )
    ids_read = choice.get("prompt_token_ids")
    if len(logprobs) > len(ids) + 1 or (isinstance(ids_read, list) and ids_read != list(ids)):
        shown = json.dumps(ids_read[:8]) if isinstance(ids_read, list) else f"{len(logprobs)} tokens"
        raise SamplerError(
            f"{url} scored other tokens than it was given ({shown} for {json.dumps(list(ids)[:8])}): it adds special"
            " tokens; use a server that takes token ids unchanged"
        )
    scores = logprobs[start : len(ids)]
    if not all(isinstance(x, int | float) and not math.isnan(x) for x in scores):
        raise Failed(f"{url} gives log-probabilities that are not numbers: {scores[:4]}", again=False)
    return math.fsum(scores)
