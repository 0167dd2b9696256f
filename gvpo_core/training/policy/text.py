"""Text to tokens and back, through a model's tokenizer: one rule for all backends and adapters.

text prompt    its tokens unchanged; the tokenizer's leading special tokens at most once, and none if the text begins
               like the chat template; no end token
chat messages  the chat template; continues a last message of the assistant, otherwise opens the next turn
response       ends at the model's end tokens, or at the token that closes an assistant's turn in the template
recorded       a text's tokens unchanged, then the end token if the response is finished; token ids unchanged
"""

import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.config import ConfigError, ModelConfig
from gvpo_core.training.policy import Mask, Prompt, Response, ResponseError, Tokens
from gvpo_core.training.policy.protocol import mask_problem

ASSISTANT = ("assistant", "model")  # roles of the model's turns
_PROBE = "zqxj"  # a response that no template contains
_QUESTION = ({"role": "user", "content": "hello"},)

log = logging.getLogger("gvpo.text")


def encode(tokenizer: Any, prompt: Prompt, config: ModelConfig) -> Tokens:
    """Token ids of a text, or of chat messages through the chat template.

    A text may already have gone through a chat template. The tokenizer's leading special tokens (BOS) are therefore not
    added if the text begins with them, or if it begins like the template: then the template decides about BOS. Trailing
    special tokens (EOS) are never added. Messages get the template's generation prompt. If the last message is the
    assistant's, it is left open to be continued.

    Raises: ConfigError: messages, but the tokenizer has no chat template; or the tokenizer changes a text's tokens when
      it adds special tokens.
    """
    if isinstance(prompt, str):
        return text_tokens(tokenizer, prompt, config.path)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the prompt is chat messages, and the tokenizer of {config.path!r} has no chat template: "
            "give prompts as text, or a model with a chat template"
        )
    return chat_tokens(tokenizer, prompt, **config.template)


def text_tokens(tokenizer: Any, text: str, name: str = "the model") -> Tokens:
    """Token ids of a text prompt; see `encode`."""
    plain, leading = _plain_tokens(tokenizer, text), _leading_tokens(tokenizer, name)
    if leading and text.startswith(_openings(tokenizer)):
        return tuple(plain)
    shared = next(n for n in range(len(leading), -1, -1) if plain[:n] == leading[len(leading) - n :])
    return tuple(leading[: len(leading) - shared] + plain)


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **template: Any) -> Tokens:
    """Token ids of chat messages; see `encode`.

    Args:
      template: further arguments of the chat template.
    Raises: ValueError: the last message is the assistant's, and it is empty or changed by the template; or the template
      leaves out a user's message. Errors of the template itself.
    """
    _check_roles(tokenizer, messages)
    open_turn = messages[-1].get("role") in ASSISTANT
    last_text = str(messages[-1].get("content") or "")
    if open_turn and not last_text.strip():  # transformers would strip the turn's header too
        raise ValueError("the last chat message is the assistant's and has no text to continue; leave that message out")
    conversation = [dict(message) for message in messages]
    try:
        ids = tokenizer.apply_chat_template(
            conversation,
            add_generation_prompt=not open_turn,
            continue_final_message=open_turn,
            tokenize=True,
            return_dict=False,
            **template,
        )
    except ValueError as e:
        rendered = "" if not open_turn else tokenizer.apply_chat_template(conversation, tokenize=False, **template)
        if not open_turn or conversation[-1]["content"].strip() in rendered:
            raise
        raise ValueError(
            "the chat template leaves out a part of the last message, which is the assistant's, so it cannot be"
            " continued; remove that part (often the thoughts up to </think>), or give the prompt as text"
        ) from e
    return tuple(int(i) for i in ids)


def _check_roles(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> None:
    """Warns if the template leaves out system messages. Raises: ValueError: it leaves out a user's message."""
    written = {str(m.get("role")) for m in messages if isinstance(m.get("content"), str) and m["content"].strip()}
    left_out = written & _left_out(tokenizer, str(tokenizer.chat_template))
    if "user" in left_out:
        raise ValueError(
            "the chat template leaves out the text of the user's message: it may want a list of parts,"
            ' [{"type": "text", "text": ...}], as content'
        )
    if left_out:
        _warn_once("the chat template leaves out system messages: the model does not see them, nor data.system_prompt")


@functools.lru_cache(maxsize=4)
def _left_out(tokenizer: Any, template: str) -> frozenset[str]:
    """Returns which of the roles system and user the template leaves out."""
    texts = {"system": _PROBE + "s", "user": _PROBE + "u"}
    for roles in (("system", "user"), ("user",)):
        with contextlib.suppress(Exception):  # a template may reject a role
            conversation = [{"role": role, "content": texts[role]} for role in roles]
            rendered = str(
                tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            ).casefold()
            return frozenset(role for role in roles if texts[role] not in rendered)
    return frozenset()


@functools.lru_cache
def _warn_once(message: str) -> None:
    log.warning(message)


def prompt_text(tokenizer: Any, tokens: Sequence[int], name: str = "the model") -> str:
    """Text of a prompt, without the tokenizer's leading special tokens: the reader's tokenizer adds them again.

    Raises: ConfigError: see `text_tokens`.
    """
    leading = _leading_tokens(tokenizer, name)
    rest = tokens[len(leading) :] if leading and list(tokens[: len(leading)]) == leading else tokens
    text: str = tokenizer.decode(list(rest), skip_special_tokens=False)
    return text


def _openings(tokenizer: Any) -> tuple[str, ...]:
    """Possible beginnings of a chat rendered by the template: the text before the first message."""
    openings = []
    for role in ("user", "system"):
        with contextlib.suppress(Exception):  # a template may reject a role
            text = tokenizer.apply_chat_template([{"role": role, "content": _PROBE}], tokenize=False)
            openings.append(text.partition(_PROBE)[0])
    return tuple(opening for opening in openings if opening.strip())


def _plain_tokens(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def _leading_tokens(tokenizer: Any, name: str) -> list[int]:
    """The special tokens that the tokenizer adds before a text."""
    plain = _plain_tokens(tokenizer, _PROBE)
    with_special = [int(i) for i in tokenizer.encode(_PROBE, add_special_tokens=True)]
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    raise ConfigError(
        f"the tokenizer of {name!r} changes the tokens of a text when it adds special tokens, so text prompts"
        " cannot be used: give chat messages, or another tokenizer"
    )


def decode(tokenizer: Any, tokens: Sequence[int], end: Sequence[int] = ()) -> str:
    """Text of a response, without BOS, EOS, padding and the tokens of `end`.

    Keeps other special tokens, such as <think> and those of tool calls: they are part of the model's answer.
    """
    left_out = {*end, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text: str = tokenizer.decode([i for i in tokens if i not in left_out], skip_special_tokens=False)
    return text


def encode_responses(
    tokenizer: Any,
    prompt: Prompt,
    responses: Sequence[str | Sequence[int]],
    finished: Sequence[bool | None],
    end: Sequence[int],
    masks: Sequence[Mask | None] | None = None,
) -> list[Response]:
    """Encodes recorded responses to a prompt as the model would have drawn them.

    A finished text gets an end token: after chat messages, the token that closes an assistant's turn in the template;
    otherwise the tokenizer's EOS. A text that already ends with an end token does not get a second one; white space
    after it is dropped. Token ids are used unchanged.

    Args:
      finished: for each response. None: a text is finished; token ids are finished if they end with an end token.
      end: ids that end a response.
      masks: for each response, the mask of the policy's own tokens; only for token ids. None: all tokens of all
        responses.
    Raises: ResponseError: an end token before the end, or one that contradicts `finished`; no tokens; a finished text
      if no end token is known; a mask that does not fit, or a mask for a text.
    """
    encoded: list[Response] = []
    masks = [None] * len(responses) if masks is None else masks
    for number, (response, ended, mask) in enumerate(zip(responses, finished, masks, strict=True)):
        try:
            if isinstance(response, str):
                if mask is not None:
                    raise ValueError("it is a text with a mask of tokens; give its token ids")
                tokens = _up_to_end(tokenizer, _plain_tokens(tokenizer, response), end)
                if ended in (True, None) and not (tokens and tokens[-1] in end):
                    tokens.append(_closing(tokenizer, prompt, end))
                    ended = True
            else:
                tokens = [int(i) for i in response]
            encoded.append(checked_response(tokens, ended, end, mask))
        except ValueError as error:
            raise ResponseError(str(error), number) from error
    return encoded


def checked_response(
    tokens: Sequence[int], finished: bool | None, end: Sequence[int], mask: Mask | None = None
) -> Response:
    """Returns the response with these tokens. Raises: ValueError: see `encode_responses`."""
    if not tokens:
        raise ValueError("it has no tokens; expected at least its end token")
    if mask is not None and (problem := mask_problem(mask, len(tokens))):
        raise ValueError(problem)
    drawn = [True] * len(tokens) if mask is None else mask
    early = [i for i, mine, next_too in zip(tokens, drawn, drawn[1:], strict=False) if mine and next_too and i in end]
    if early:
        raise ValueError(f"it has the end token {early[0]} before its end; the policy draws nothing after an end token")
    last = max(place for place, mine in enumerate(drawn) if mine)
    ended = tokens[last] in end
    if mask is not None and finished is False:
        ended = False  # an episode may be cut between two turns, each with its end token
    if finished is not None and finished != ended:
        is_end = "an" if ended else "no"
        raise ValueError(
            f"finished is {str(finished).lower()}, and its last token {tokens[last]} is {is_end} end token"
            f" ({', '.join(map(str, end)) or 'there is none'})"
        )
    return Response(tuple(tokens), ended, mask=None if mask is None or all(mask) else tuple(map(bool, mask)))


def _up_to_end(tokenizer: Any, tokens: list[int], end: Sequence[int]) -> list[int]:
    """Drops white space after the first end token."""
    first = next((place for place, i in enumerate(tokens) if i in end), len(tokens))
    after = tokens[first + 1 :]
    return tokens if after and tokenizer.decode(after, skip_special_tokens=False).strip() else tokens[: first + 1]


def _closing(tokenizer: Any, prompt: Prompt, end: Sequence[int]) -> int:
    """The end token of a finished answer to `prompt`. Raises: ValueError: the model does not define it."""
    closing = None
    if not isinstance(prompt, str):
        before = prompt[:-1] if prompt[-1].get("role") in ASSISTANT else prompt  # continues the last answer
        with contextlib.suppress(Exception):  # a template may raise anything; then the tokenizer decides
            closing = turn_end(tokenizer, before)
    closing = tokenizer.eos_token_id if closing is None else closing
    if closing is None or closing not in end:
        closing = end[0] if end else None
    if closing is None:
        raise ValueError("it is finished, and the model has no end token; set the tokenizer's eos_token")
    return int(closing)


def end_tokens(generation_eos: int | Sequence[int] | None, tokenizer: Any) -> list[int]:
    """Ids that end a response: those of the generation settings, the tokenizer and the chat template.

    Warns if there is none.

    Raises: ConfigError: the generation settings have an invalid eos_token_id.
    """
    generation_ids = list(generation_eos) if isinstance(generation_eos, list | tuple) else [generation_eos]
    for i in generation_ids:
        if i is not None and (isinstance(i, bool) or not isinstance(i, int)):
            raise ConfigError(f"eos_token_id = {generation_eos!r} in the model's settings; expected token ids")
    closing = None
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(Exception):  # a template that rejects the probe may raise anything
            closing = turn_end(tokenizer)
    ids = sorted({i for i in (*generation_ids, tokenizer.eos_token_id, closing) if i is not None})
    if not ids:
        log.warning(
            "no end token: neither the generation settings, the tokenizer nor a chat template names one, so every"
            " response runs to rollout.max_tokens; set eos_token in tokenizer_config.json"
        )
    return ids


def turn_end(tokenizer: Any, messages: Sequence[Mapping[str, Any]] = _QUESTION) -> int | None:
    """The special token that follows an assistant's answer to `messages` in the chat template; None: no such token.

    Raises: errors of the template, if it rejects an answer there.
    """
    answered = [*(dict(m) for m in messages), {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    _, probe, after = text.rpartition(_PROBE)
    ids = _plain_tokens(tokenizer, after.lstrip()) if probe else []
    while ids and not tokenizer.decode(ids[:1], skip_special_tokens=False).strip():
        ids = ids[1:]  # some tokenizers put a space first
    return ids[0] if ids and ids[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} else None


def exported_eos(generation_eos: int | Sequence[int] | None, end: Sequence[int]) -> int | list[int] | None:
    """eos_token_id of an exported model: `generation_eos`, or all of `end` if it lacks some of them."""
    if generation_eos is None or isinstance(generation_eos, int):
        return generation_eos if {*end} <= {generation_eos} else list(end)
    return list(generation_eos) if {*end} <= {*generation_eos} else list(end)


def describe_end_tokens(tokenizer: Any, end: Sequence[int]) -> str:
    """Names the end tokens, for `Policy.describe`."""
    return ", ".join(map(str, tokenizer.convert_ids_to_tokens(list(end)))) or "none: responses run to max_tokens"
