"""A conversation as the tokens that the policy saw and drew.

The policy's turns keep the tokens that it drew, even if their text would tokenize differently. Messages from outside
are tokenized once: the text that the chat template adds to the conversation so far, including the end of the turn. If a
template changes earlier text (for example, drops thoughts), there is no such text. A new segment then begins; its
prompt is the conversation as the template renders it at that point.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gvpo_core.training.config import ConfigError
from gvpo_core.training.policy import Mask, Response, Segment, Tokens

_PROBE = "zqxj"  # a message that no template contains
Message = Mapping[str, Any]
History = Literal["segments", "keep", "error"]  # see `EnvironmentConfig.history`


class RewrittenError(ConfigError):
    """A chat template renders earlier turns differently from how the policy saw them."""


class Chat:
    """The chat template of a tokenizer, with the tools of a run."""

    def __init__(
        self, tokenizer: Any, tools: Sequence[Mapping[str, Any]] = (), *, history: History = "segments"
    ) -> None:
        """
        Args:
          tools: schemas in OpenAI's format.
          history: what to do if the template rewrites earlier turns; see `EnvironmentConfig.history`.
        Raises: ConfigError: there is no chat template.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("episodes need a chat template, and the model's tokenizer has none")
        self.tokenizer, self.history = tokenizer, history
        self.tools = [dict(tool) for tool in tools] or None

    def text(self, messages: Sequence[Message]) -> str:
        """Renders the conversation with an open assistant turn. Raises: ConfigError: the template rejects it."""
        try:
            copies = [dict(message) for message in messages]
            return str(
                self.tokenizer.apply_chat_template(copies, tools=self.tools, add_generation_prompt=True, tokenize=False)
            )
        except Exception as e:  # a template may raise anything
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


class Heard(NamedTuple):
    """The input of the policy's next turn."""

    tokens: list[int]  # those after its last turn; for a new segment, the whole prompt
    text: str | None  # the whole conversation as the policy sees it; None: the template renders it differently
    anew: bool  # whether a new segment begins


class Transcript:
    """One episode so far: `messages`, and the tokens of its segments with the masks of the policy's own tokens."""

    def __init__(self, chat: Chat, prompt: Sequence[Message], tokens: Tokens) -> None:
        """`tokens`: token ids of the prompt."""
        self.chat, self.prompt, self.prompt_length = chat, [dict(m) for m in prompt], len(tokens)
        self.messages: list[dict[str, Any]] = []  # after the prompt
        self.before: list[Segment] = []  # segments that have ended
        self.segment_prompt = tokens  # of the current segment
        self.tokens: list[int] = []  # after the segment's prompt
        self._own: list[bool] = []
        self._text: str | None = chat.text(prompt)  # as the policy saw it; None: the template differs
        self._end = -1

    @property
    def context(self) -> Tokens:
        """All tokens that the policy sees."""
        return (*self.segment_prompt, *self.tokens)

    @property
    def length(self) -> int:
        """Number of tokens that the policy sees after the episode's prompt."""
        return len(self.segment_prompt) + len(self.tokens) - self.prompt_length

    @property
    def mask(self) -> Mask | None:
        """Mask of the current segment; see `Response.mask`."""
        return None if all(self._own) else tuple(self._own)

    @property
    def segments(self) -> list[Segment]:
        """All segments, in order."""
        return [*self.before, Segment(self.segment_prompt, tuple(self.tokens), self.mask)]

    def say(self, response: Response, text: str) -> None:
        """Adds a turn of the policy; `text` is the text of the response, without its end token."""
        self.messages.append({"role": "assistant", "content": text})
        self.tokens += response.tokens
        self._own += [True] * len(response.tokens)
        self._end = response.tokens[-1]

    def heard(self, messages: Sequence[Message]) -> Heard:
        """Returns the input that `messages` add after the policy's last turn.

        Raises: RewrittenError: the template renders earlier turns differently from how the policy saw them, and the
          settings do not allow a new segment.
        """
        rendered = self.chat.text([*self.prompt, *self.messages, *messages])
        try:
            return self._continued(messages, rendered)
        except RewrittenError:
            if self.chat.history != "segments":
                raise
        return Heard(self.chat.ids(rendered), rendered, True)

    def _continued(self, messages: Sequence[Message], rendered: str) -> Heard:
        end = str(self.chat.tokenizer.decode([self._end], skip_special_tokens=False))
        reply = self.messages[-1]["content"]
        if self._text is not None:
            for words in (
                reply + end,
                reply.strip() + end,
                reply,
                reply.strip(),
            ):  # trimmed; ended by another end token
                before = self._text + words
                if rendered.startswith(before):
                    return Heard(self._after_end(end, rendered[len(before) :]), rendered, False)
        if self.chat.history != "keep":
            raise RewrittenError(
                "the chat template renders earlier turns differently from how the policy saw them (it drops thoughts,"
                " or its generation prompt holds text that it leaves out later); set environment.history = 'segments'"
                " to give such a turn its own prompt, or 'keep' to train on turns as they were seen"
            )
        probed = [*self.messages[:-1], self.messages[-1] | {"content": _PROBE}]
        _, probe, after = self.chat.text([*self.prompt, *probed, *messages]).rpartition(_PROBE)
        if not probe:
            raise RewrittenError("the chat template leaves out the assistant's turn, so it cannot be continued")
        return Heard(self._after_end(end, after.removeprefix(end)), None, False)

    def _after_end(self, end: str, text: str) -> list[int]:
        """Tokens of `text` after the end token. Encodes both: some tokenizers begin a text with a space."""
        ids = self.chat.ids(end + text)
        if not ids or ids[0] != self._end:
            raise RewrittenError(f"the tokenizer does not read the end token {end!r} as the one token {self._end}")
        return ids[1:]

    def length_with(self, heard: Heard) -> int:
        """Value of `length` after `hear`."""
        return len(heard.tokens) - self.prompt_length if heard.anew else self.length + len(heard.tokens)

    def hear(self, messages: Sequence[Message], heard: Heard) -> None:
        """Adds messages from outside; `heard` is the result of the method `heard` for them."""
        self.messages += [dict(message) for message in messages]
        self._text = heard.text
        if heard.anew:
            self.before.append(Segment(self.segment_prompt, tuple(self.tokens), self.mask))
            self.segment_prompt, self.tokens, self._own = tuple(heard.tokens), [], []
        else:
            self.tokens += heard.tokens
            self._own += [False] * len(heard.tokens)
