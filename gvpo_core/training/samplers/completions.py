"""Requests and answers of an OpenAI-compatible server: token ids, text, or chat messages in and text out."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.policy.protocol import Tokens
from gvpo_core.training.samplers.http import Failed
from gvpo_core.training.samplers.protocol import Drawn, SamplerError, Text
from gvpo_core.training.sampling import Sampling


def _sampling_fields(sampling: Sampling, off: int) -> dict[str, Any]:
    """Every field, so that no default of the server applies. `off`: the value of top_k that means all tokens."""
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
    """One request for all responses to a prompt; the server makes its seeds of the first."""
    fields = {"model": model, "prompt": list(prompt), "n": len(seeds), "seed": seeds[0] % 2**31}
    return fields | _sampling_fields(sampling, -1) | {"logprobs": 0, "return_token_ids": True}


def request_of_text(model: str, prompt: str, seed: int, sampling: Sampling) -> dict[str, Any]:
    """A request for one response: many servers ignore `n`."""
    return {"model": model, "prompt": prompt, "seed": seed % 2**31} | _sampling_fields(sampling, 0)


def request_of_chat(model: str, messages: Sequence[Mapping[str, Any]], seed: int, sampling: Sampling) -> dict[str, Any]:
    """A request to /v1/chat/completions for one response; the server applies its own chat template."""
    messages_sent = [dict(message) for message in messages]
    return {"model": model, "messages": messages_sent, "seed": seed % 2**31} | _sampling_fields(sampling, 0)


def read_answer(content: bytes, model: str, url: str) -> dict[str, Any]:
    """An answer that has choices and is of this model. Raises: Failed."""
    try:
        answer = json.loads(content)
    except ValueError as e:
        raise Failed(f"{url} answers no JSON: {e}", again=True) from e
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise Failed(f"{url} answers without choices", again=True)
    if answer.get("model", model) != model:
        raise Failed(f"{url} answers as the model {answer['model']!r}; asked for {model!r}", again=True)
    return answer


def read_ids(choice: dict[str, Any], version: int | None, url: str) -> Drawn:
    """The response of a choice with token ids. Raises: SamplerError: it has none. Failed: the response was aborted."""
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
    """The response of a choice with text or a message. Raises: Failed: it has none, or the response was aborted.

    Args:
      usage: of the answer, which has this choice alone.
    """
    reason, message = choice.get("finish_reason"), choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise Failed(f"{url} ended a response with {reason!r} and {type(text).__name__} as its text", again=False)
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Text(text, reason == "stop", version, counted if isinstance(counted, int) else None)
