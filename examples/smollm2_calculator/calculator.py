"""The environment: a question, a calculator that the policy may call, and one answer."""

import re
from collections.abc import Mapping
from typing import Any

CALL = re.compile(r"calc\((\d{1,6})\*(\d{1,6})\)")


class Calculator:
    """Answers `calc(12*34)` with the product. Any other message is the final answer: reward 1 for the right number."""

    def reset(self, row: Mapping[str, Any]) -> None:
        """Returns no messages: the row's own messages are the prompt."""
        self.answer = str(row["answer"])

    def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]], float, bool]:
        """Returns the product, or the reward of the answer."""
        text = message["content"].strip()
        if call := CALL.fullmatch(text):
            return [{"role": "tool", "content": str(int(call[1]) * int(call[2]))}], 0.0, False
        return [], float(text.rstrip(".") == self.answer), True
