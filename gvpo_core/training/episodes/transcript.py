"""A conversation as the tokens that the policy saw and drew.

What the policy said stays the tokens that it drew, whatever its text would tokenize to. What it hears is tokenized
once: the part that the chat template adds to the text of the conversation so far, the turn's end included. A template
that changes earlier text (it drops thoughts, say) has no such part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Mask, Response, Tokens

_PROBE = "zqxj"  # a message that no template contains
Message = Mapping[str, Any]


class RewrittenError(ConfigError):
    """A chat template that renders earlier turns in another way than the policy saw them."""


class Chat:
    """A tokenizer's chat template with the tools of a run."""

    def __init__(self, tokenizer: Any, tools: Sequence[Mapping[str, Any]] = (), *, keep: bool = False) -> None:
        """
        Args:
          tools: schemas in OpenAI's form.
          keep: where the template rewrites earlier turns, keep them as the policy saw them.
        Raises: ConfigError: there is no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("episodes need a chat template, and the model's tokenizer has none")
        self.tokenizer, self.keep = tokenizer, keep
        self.tools = [dict(tool) for tool in tools] or None

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation with an open turn of the assistant. Raises: ConfigError: the template refuses it."""
        try:
            given = [dict(message) for message in messages]
            return str(
                self.tokenizer.apply_chat_template(given, tools=self.tools, add_generation_prompt=True, tokenize=False)
            )
        except Exception as e:  # a template raises what it likes
            roles = ", ".join(str(m.get("role")) for m in messages)
            raise ConfigError(f"the chat template cannot render messages of the roles {roles}: {e}") from e

    def shows_tools(self) -> bool:
        """Whether the template renders the tools at all."""
        question = [{"role": "user", "content": _PROBE}]
        return self.text(question) != Chat(self.tokenizer).text(question)

    def tokens(self, messages: Sequence[Message]) -> Tokens:
        """Token ids of a prompt."""
        return tuple(self.ids(self.text(messages)))

    def ids(self, text: str) -> list[int]:
        """Token ids of rendered text."""
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]


class Transcript:
    """One episode so far: `messages`, and the tokens after the prompt with the mask of the policy's own."""

    def __init__(self, chat: Chat, prompt: Sequence[Message], tokens: Tokens) -> None:
        """`tokens`: of the prompt."""
        self.chat, self.prompt, self.prompt_tokens = chat, [dict(m) for m in prompt], tokens
        self.messages: list[dict[str, Any]] = []  # after the prompt
        self.tokens: list[int] = []  # after the prompt
        self._own: list[bool] = []
        self._text: str | None = chat.text(prompt)  # as the policy saw it; None: the template renders it otherwise
        self._end = -1

    @property
    def context(self) -> Tokens:
        """Everything so far."""
        return (*self.prompt_tokens, *self.tokens)

    @property
    def own(self) -> Mask | None:
        """See `Response.own`."""
        return None if all(self._own) else tuple(self._own)

    def say(self, response: Response, text: str) -> None:
        """Adds a turn of the policy; `text` is the response's, without its end token."""
        self.messages.append({"role": "assistant", "content": text})
        self.tokens += response.tokens
        self._own += [True] * len(response.tokens)
        self._end = response.tokens[-1]

    def heard(self, messages: Sequence[Message]) -> tuple[list[int], str | None]:
        """The tokens that go between the policy's last turn and its next one, and the whole text then.

        Raises: RewrittenError: the template renders what came before in another way than the policy saw it.
        """
        end = str(self.chat.tokenizer.decode([self._end], skip_special_tokens=False))
        whole = self.chat.text([*self.prompt, *self.messages, *messages])
        said = self.messages[-1]["content"]
        if self._text is not None:
            for words in (said + end, said.strip() + end, said, said.strip()):  # trimmed; ended by another end token
                before = self._text + words
                if whole.startswith(before):
                    return self._continued(end, whole[len(before) :]), whole
        if not self.chat.keep:
            raise RewrittenError(
                "the chat template renders earlier turns in another way than the policy saw them (it drops thoughts, or"
                " its generation prompt holds text that it leaves out later); set environment.history = 'keep' to train"
                " on turns as they were seen, or use another template"
            )
        probed = [*self.messages[:-1], self.messages[-1] | {"content": _PROBE}]
        _, found, after = self.chat.text([*self.prompt, *probed, *messages]).rpartition(_PROBE)
        if not found:
            raise RewrittenError("the chat template leaves out the assistant's turn, so it cannot be continued")
        return self._continued(end, after.removeprefix(end)), None

    def _continued(self, end: str, text: str) -> list[int]:
        """Tokens of `text` as they are after the end token: some tokenizers begin a text with a space."""
        ids = self.chat.ids(end + text)
        if not ids or ids[0] != self._end:
            raise RewrittenError(f"the tokenizer does not read the end token {end!r} as the one token {self._end}")
        return ids[1:]

    def hear(self, messages: Sequence[Message], tokens: Sequence[int], text: str | None) -> None:
        """Adds messages from outside, with the tokens and text of `heard`."""
        self.messages += [dict(message) for message in messages]
        self.tokens += tokens
        self._own += [False] * len(tokens)
        self._text = text
