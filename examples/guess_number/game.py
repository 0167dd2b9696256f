"""The game: find a number from 1 to 9 with hints."""

from collections.abc import Mapping
from typing import Any


class Guess:
    """Answers each guess with `<` (lower), `>` (higher) or `!` (not a number). Ends when the guess is right.

    Reward: 1 for the right number, and 0.1 for every guess that agrees with the hints so far.
    """

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """Returns the first message, which is the same in all games. Only the environment knows the secret."""
        self.secret, self.low, self.high = int(row["secret"]), 1, 9
        return [{"role": "user", "content": "?"}]

    def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]], float, bool]:
        """Returns the hint, the reward, and whether the game is over."""
        answer = message["content"]
        if answer not in list("123456789"):
            return [{"role": "user", "content": "!"}], 0.0, False
        guess = int(answer)
        allowed = 0.1 * (self.low <= guess <= self.high)
        if guess == self.secret:
            return [], 1.0 + allowed, True
        if guess < self.secret:
            self.low = max(self.low, guess + 1)
        else:
            self.high = min(self.high, guess - 1)
        return [{"role": "user", "content": ">" if guess < self.secret else "<"}], allowed, False
