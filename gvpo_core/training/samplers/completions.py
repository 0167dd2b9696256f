"""Requests and answers of an OpenAI-compatible server: token ids, text, or chat messages in and text out."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

from gvpo_core.training.policy import Policy, Prompt
from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.http import Failed, read_json
from gvpo_core.training.samplers.protocol import Drawn, SamplerError, Text
from gvpo_core.training.sampling import Sampling


class Interface(Protocol):
    """Builds requests to a server, and reads its answers."""

    path: str

    def requests(
        self, served: str, prompt: Tokens | Prompt, seeds: Sequence[int], sampling: Sampling, policy: Policy | None
    ) -> list[dict[str, Any]]:
        """Returns the bodies of the requests for len(seeds) responses to a prompt.

        Args:
          served: name of the model to request. Empty: the server's weights have no name.
          policy: the policy whose weights were sent last; None before `refresh`.
        Raises: SamplerError: the prompt cannot be sent.
        """
        ...

    def choices(self, content: bytes, served: str) -> list[dict[str, Any]]:
        """Returns the responses in an answer, which must have the requested name. Raises: Failed."""
        ...

    def response(self, choice: dict[str, Any], body: dict[str, Any], version: int | None) -> Drawn | Text:
        """Reads a response. Raises: SamplerError: it has no token ids. Failed: it was aborted."""
        ...


class OpenAI:
    """An `Interface` to /v1/completions or /v1/chat/completions."""

    def __init__(
        self, url: str, tokens: Literal["ids", "text", "chat"], omit: Sequence[str], fields: Mapping[str, Any]
    ) -> None:
        self.url, self.tokens, self.omit, self.fields = url, tokens, omit, fields
        self.path = "/v1/chat/completions" if tokens == "chat" else "/v1/completions"

    def requests(
        self, served: str, prompt: Tokens | Prompt, seeds: Sequence[int], sampling: Sampling, policy: Policy | None
    ) -> list[dict[str, Any]]:
        """For ids, returns one request: the server derives all seeds from the first. For text, one per response."""
        bodies = self._requests(served, prompt, seeds, sampling, policy)
        return [{k: v for k, v in body.items() if k not in self.omit} | dict(self.fields) for body in bodies]

    def _requests(
        self, served: str, prompt: Tokens | Prompt, seeds: Sequence[int], sampling: Sampling, policy: Policy | None
    ) -> list[dict[str, Any]]:
        if self.tokens == "chat":
            if isinstance(prompt, str) or not isinstance(prompt[0], Mapping):
                raise SamplerError(
                    f"engine.tokens = 'chat' takes prompts of chat messages, and this one is {str(prompt)[:60]!r}: give"
                    " messages in the data, or use engine.tokens = 'text'"
                )
            messages = cast(Sequence[Mapping[str, Any]], prompt)
            return [request_of_chat(served, messages, seed, sampling) for seed in seeds]
        ids = cast(Tokens, tuple(prompt))
        if self.tokens == "ids":
            return [request_of_ids(served, ids, seeds, sampling)]
        if policy is None:
            raise SamplerError(
                "tokens = 'text' needs refresh(policy, version) before it draws: the policy has the text"
            )
        text = policy.prompt_text(ids)
        return [request_of_text(served, text, seed, sampling) for seed in seeds]

    def choices(self, content: bytes, served: str) -> list[dict[str, Any]]:
        """See `Interface`. Adds the answer's `usage`, which belongs to the choice only if there is just one."""
        answer = read_answer(content, served, self.url)
        return [choice | {"usage": answer.get("usage")} for choice in answer["choices"]]

    def response(self, choice: dict[str, Any], body: dict[str, Any], version: int | None) -> Drawn | Text:
        """Reads a response as ids or text, depending on the request."""
        if self.tokens != "ids":
            return read_text(choice, choice["usage"], version, self.url)
        return read_ids(choice, version, self.url)


def _sampling_fields(sampling: Sampling, off: int) -> dict[str, Any]:
    """Sets every field, so that no default of the server applies. `off`: the value of top_k that means all tokens."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or off,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stream": False,
    }


def request_of_ids(model: str, prompt: Tokens, seeds: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """One request for all responses to a prompt. The server derives their seeds from the first."""
    fields = {"model": model, "prompt": list(prompt), "n": len(seeds), "seed": seeds[0] % 2**31}
    return fields | _sampling_fields(sampling, -1) | {"logprobs": 0, "return_token_ids": True}


def request_of_text(model: str, prompt: str, seed: int, sampling: Sampling) -> dict[str, Any]:
    """A request for one response, since many servers ignore `n`."""
    return {"model": model, "prompt": prompt, "seed": seed % 2**31} | _sampling_fields(sampling, 0)


def request_of_chat(model: str, messages: Sequence[Mapping[str, Any]], seed: int, sampling: Sampling) -> dict[str, Any]:
    """A request to /v1/chat/completions for one response. The server applies its own chat template."""
    messages_sent = [dict(message) for message in messages]
    return {"model": model, "messages": messages_sent, "seed": seed % 2**31} | _sampling_fields(sampling, 0)


def read_answer(content: bytes, model: str, url: str) -> dict[str, Any]:
    """Reads an answer. Raises: Failed: it has no choices, or is of another model."""
    answer = read_json(content, url)
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise Failed(f"{url} answers without choices", again=True)
    if answer.get("model", model) != model:
        raise Failed(f"{url} answers as the model {answer['model']!r}; asked for {model!r}", again=True)
    return answer


def read_ids(choice: dict[str, Any], version: int | None, url: str) -> Drawn:
    """Reads a response with token ids. Raises: SamplerError: it has none. Failed: the response was aborted."""
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list):
        raise SamplerError(
            f"{url} gives no token ids (return_token_ids): use a server that does, such as vLLM, or take its text with"
            " engine.tokens = 'text'"
        )
    if reason not in ("stop", "length") or not ids:  # an aborted response was not cut by the limit
        raise Failed(f"{url} ended a response of {len(ids)} tokens with {reason!r}", again=False)
    tokens = (choice.get("logprobs") or {}).get("token_logprobs") or []
    known = len(tokens) == len(ids) and all(isinstance(x, int | float) for x in tokens)
    return Drawn(tuple(ids), reason == "stop", float(sum(tokens)) if known else float("nan"), version)


def read_text(choice: dict[str, Any], usage: Any, version: int | None, url: str) -> Text:
    """Reads a response with text or a message. Raises: Failed: it has neither, or the response was aborted.

    Args:
      usage: usage field of the answer, which must have only this choice.
    """
    reason, message = choice.get("finish_reason"), choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise Failed(f"{url} ended a response with {reason!r} and {type(text).__name__} as its text", again=False)
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Text(text, reason == "stop", version, count if isinstance(count, int) else None)
