"""A policy that says what a script says, over a bigram model of characters with a chat template: for episodes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from toy_policy import ToyPolicy

from gvpo_core.training.config import ModelConfig, OptimizerConfig
from gvpo_core.training.policy import Response, Tokens
from gvpo_core.training.sampling import Sampling, uniforms

SPECIAL = ("<end>", "<system>", "<user>", "<assistant>", "<tool>")
CHARACTERS = "\n" + "".join(chr(c) for c in range(32, 127))
Script = Callable[[str, float], str]
"""(the conversation as text, a number in [0, 1) from the turn's seed) -> what to say; "..." at its end: cut there."""


class ChatCharacters:
    """One token a character, and a chat template: `<role>content<end>` for each message."""

    chat_template = "written in Python"
    bos_token_id = pad_token_id = None
    eos_token_id = 0
    all_special_ids = tuple(range(len(SPECIAL)))

    def __init__(self) -> None:
        self.names = [*SPECIAL, *CHARACTERS]
        self.added_tokens_decoder: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = []
        while text:
            special = next((name for name in SPECIAL if text.startswith(name)), text[0])
            ids.append(self.names.index(special))
            text = text[len(special) :]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.names[i] for i in ids if not (skip_special_tokens and i < len(SPECIAL)))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.names[i] for i in ids]

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> Any:
        text = "<system>" + " ".join(t["function"]["name"] for t in tools) + "<end>" if tools else ""
        text += "".join(f"<{m['role']}>{m['content']}<end>" for m in messages)
        text += "<assistant>" if add_generation_prompt else ""
        return self.encode(text) if tokenize else text


class ScriptedPolicy(ToyPolicy):
    """Draws the script's turns; scores and steps as the bigram model."""

    script: Script

    def __init__(self, script: Script, *, updates: int = 10, reference: bool = True, model: str = "") -> None:
        self.script = script
        self.calls: list[tuple[int, int]] = []  # of generate: conversations, responses
        super().__init__(
            ModelConfig(path=model or "scripted"),
            OptimizerConfig(learning_rate=0.1),
            updates=updates,
            reference=reference,
            seed=0,
        )

    def _read_tokenizer(self) -> None:
        self.folder, self.tokenizer, self._end = Path("."), ChatCharacters(), [0]

    def _initial(self) -> np.ndarray:
        size = len(self.tokenizer.names)
        return np.random.default_rng(0).normal(size=(size, size))

    def _generate(
        self, prompts: Sequence[Tokens], seeds: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[list[Response]]:
        self.calls.append((len(prompts), sum(map(len, seeds))))
        return [[self._say(p, s, sampling) for s in own] for p, own in zip(prompts, seeds, strict=True)]

    def _say(self, prompt: Tokens, seed: int, sampling: Sampling) -> Response:
        text = self.script(self.tokenizer.decode(prompt), float(uniforms([seed], 0, 1)[0, 0]))
        ids = self.tokenizer.encode(text.removesuffix("...")) + ([] if text.endswith("...") else [0])
        ids = ids[: sampling.max_tokens]
        return Response(tuple(ids), ids[-1] == 0)
