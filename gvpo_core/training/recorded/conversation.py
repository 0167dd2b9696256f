"""Reads a prompt and its responses from text, token ids or message lists, with an explicit or implicit prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.policy.text import ASSISTANT
from gvpo_core.training.rows import DataError


def plain_list(value: Any, where: str) -> list[Any]:
    """Converts a list or array to a list. Raises: DataError: it is neither."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise DataError(f"{where} is a {type(value).__name__} ({value!r:.40}); expected a list, one entry a response")
    return [item.tolist() if hasattr(item, "tolist") else item for item in value]


def answers(
    prompt: Any, values: Sequence[Any], where: str, columns: Sequence[str], *, implicit: bool = False
) -> tuple[Any, list[Any]]:
    """Returns the prompt, and the responses as text or token ids.

    A response is text, token ids, or messages that end with one of the assistant. The messages before the last one are
    the end of the prompt, or all of it (an implicit prompt).

    Args:
      prompt: text, messages, or None if it is implicit.
      values: the responses.
      columns: the column of each response, for error messages.
      implicit: if there is no prompt, use the common beginning of the texts, up to a space.
    Raises: DataError: the responses answer different prompts, or do not fit the prompt.
    """
    prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    conversation = prompt
    responses: list[Any] = []
    for j, (response, column) in enumerate(zip(values, columns, strict=True)):
        at = f"{where}, column {column!r}" + (f", entry {j}" if columns.count(column) > 1 else "")
        response = [response] if isinstance(response, Mapping) else response
        response = response.tolist() if hasattr(response, "tolist") else response
        if _is_messages(response):
            before, answer = _last(response, at)
            full_prompt = _whole_prompt(prompt, before, at)
            if j and responses and full_prompt != conversation:
                raise DataError(f"{at} answers another conversation than the response before it; expected one prompt")
            conversation, response = full_prompt, answer
        elif not isinstance(response, str) and not _is_ids(response):
            raise DataError(
                f"{at} is a {type(response).__name__} ({response!r:.40}); expected text, token ids or messages"
            )
        responses.append(response)
    if implicit and conversation is None and all(isinstance(r, str) for r in responses):
        conversation, responses = _shared_beginning(responses, where)
    return conversation, responses


def _is_messages(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(isinstance(m, Mapping) for m in value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _last(messages: Sequence[Mapping[str, Any]], where: str) -> tuple[list[Mapping[str, Any]], str]:
    last = messages[-1]
    if last.get("role") not in ASSISTANT or not isinstance(last.get("content"), str):
        raise DataError(
            f"{where} ends with a message of role {last.get('role')!r}; expected the assistant's, with text as content"
        )
    return [_without_none(m) for m in messages[:-1]], last["content"]


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _whole_prompt(prompt: Any, before: list[Mapping[str, Any]], where: str) -> Any:
    """Returns the prompt of a response that is a list of messages; `before`: the messages before the answer."""
    if prompt is None:
        return before or None
    if isinstance(prompt, str):
        if not before:
            return [{"role": "user", "content": prompt}]
        if any(message.get("content") == prompt for message in before):
            return before
        raise DataError(f"{where} does not answer the prompt {prompt!r:.60}: none of its messages is that text")
    messages = [_without_none(m) for m in prompt] if _is_messages(prompt) else prompt
    if not before or before == messages:
        return messages
    if before[: len(messages)] == messages:
        return before
    raise DataError(f"{where} begins with other messages than the prompt; expected the same, or the answer alone")


def _shared_beginning(responses: list[str], where: str) -> tuple[str, list[str]]:
    shared = 0
    for letters in zip(*responses, strict=False):
        if len({*letters}) > 1:
            break
        shared += 1
    while shared and not responses[0][:shared][-1].isspace():
        shared -= 1
    beginning = responses[0][:shared].rstrip()
    if not beginning:
        raise DataError(f"{where} has no prompt, and its responses do not begin alike; expected a column 'prompt'")
    return beginning, [response[len(beginning) :] for response in responses]
