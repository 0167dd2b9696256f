"""Uses a Gymnasium environment for episodes: observations become messages, and the policy's words become actions.

    [environment]
    path = "examples/gymnasium/environment.py:Gymnasium"

    [environment.options]
    id = "FrozenLake-v1"
    arguments = { render_mode = "ansi", is_slippery = false }
    actions = { left = 0, down = 1, right = 2, up = 3 }
    rules = "Walk from S to G and avoid the holes H. Answer with left, down, right or up."

Needs `pip install gymnasium`, and `gymnasium[toy-text]` for FrozenLake. With render_mode "ansi" the policy reads the
rendered text, else str() of the observation. A row's columns `seed` and `reset` are the arguments of the reset.
"""

import re
from collections.abc import Mapping
from typing import Any

_COLOUR = re.compile(r"\x1b\[(\d+)m(.)\x1b\[0m")


class Gymnasium:
    """One Gymnasium environment, for one episode at a time."""

    def __init__(
        self,
        id: str,
        actions: Mapping[str, Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        rules: str = "",
        unknown_reward: float = 0.0,
    ) -> None:
        """
        Args:
          id: id for gymnasium.make, or "module:id".
          actions: word -> action. None: the policy's text is the action, for a space of texts.
          arguments: further arguments of gymnasium.make.
          rules: first lines of the first message.
          unknown_reward: reward of a turn without a known word; the environment then takes no step.
        """
        import gymnasium

        self.env = gymnasium.make(id, **(arguments or {}))
        self.actions, self.rules, self.unknown_reward = actions, rules, unknown_reward
        if actions is None and not isinstance(self.env.action_space, gymnasium.spaces.Text):
            raise ValueError(f"{id} takes {self.env.action_space} and no texts: give actions, a word for each action")
        for word, action in (actions or {}).items():
            if not self.env.action_space.contains(action):
                raise ValueError(f"actions.{word} = {action!r}; {id} takes {self.env.action_space}")

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """Returns the first message: rules and first observation. A row without a seed has seed 0."""
        observation, _ = self.env.reset(seed=row.get("seed", 0), options=row.get("reset"))
        first = [part for part in (self.rules, self._text(observation)) if part]
        return [{"role": "user", "content": "\n".join(first)}]

    def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]], float | None, bool]:
        """Takes the action of the last known word in the policy's message."""
        action: Any = message["content"]
        if self.actions is not None:
            words = [word for word in re.findall(r"\w+", message["content"].lower()) if word in self.actions]
            if not words:
                hint = f"Say one of {', '.join(self.actions)}."
                return [{"role": "user", "content": hint}], self.unknown_reward, False
            action = self.actions[words[-1]]
        observation, reward, terminated, truncated, _ = self.env.step(action)
        messages = [{"role": "user", "content": self._text(observation)}]
        done = bool(terminated or truncated)
        return [] if done else messages, float(reward), done

    def close(self) -> None:
        """Closes the environment."""
        self.env.close()

    def _text(self, observation: Any) -> str:
        """Returns the rendered text with brackets instead of colours, or the observation."""
        if self.env.render_mode == "ansi":
            return _COLOUR.sub(r"[\2]", str(self.env.render())).strip()
        return str(observation)
