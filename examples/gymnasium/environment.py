"""A Gymnasium environment as an environment of episodes: its observations are messages, the policy's words are actions.

    [environment]
    path = "examples/gymnasium/environment.py:Gymnasium"

    [environment.options]
    id = "FrozenLake-v1"
    arguments = { render_mode = "ansi", is_slippery = false }
    actions = { left = 0, down = 1, right = 2, up = 3 }
    rules = "Walk from S to G and avoid the holes H. Answer with left, down, right or up."

Needs `pip install gymnasium`, and `gymnasium[toy-text]` for FrozenLake. What the policy reads is the rendered text with
render_mode "ansi", else str() of the observation. A row's columns `seed` and `reset` start its episodes.
"""

import re
from collections.abc import Mapping
from typing import Any

_COLOUR = re.compile(r"\x1b\[(\d+)m(.)\x1b\[0m")


class Gymnasium:
    """One environment of its own for each episode."""

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
          id: as gymnasium.make takes it, "module:id" too.
          actions: word -> action. None: what the policy says is the action, for a space of texts.
          arguments: of gymnasium.make.
          rules: first lines of the first message.
          unknown_reward: of a turn without a known word; the environment takes no step then.
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
        """The first message: rules and first observation. The row's seed is 0 where it has none."""
        observation, _ = self.env.reset(seed=row.get("seed", 0), options=row.get("reset"))
        first = [part for part in (self.rules, self._text(observation)) if part]
        return [{"role": "user", "content": "\n".join(first)}]

    def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]], float | None, bool]:
        """Takes the action of the last known word that the policy says."""
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
        """Ends the environment."""
        self.env.close()

    def _text(self, observation: Any) -> str:
        """The rendered text, with marks instead of colours; else the observation."""
        if self.env.render_mode == "ansi":
            return _COLOUR.sub(r"[\2]", str(self.env.render())).strip()
        return str(observation)
