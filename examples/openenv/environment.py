"""Uses an OpenEnv server for episodes: the policy's text becomes an action, and the observation's text a message.

    [environment]
    path = "examples/openenv/environment.py:OpenEnv"
    options = { url = "http://localhost:8000", action = "message", observation = "text" }

Needs `pip install openenv`. Each episode has its own session on the server.
"""

from collections.abc import Mapping
from typing import Any


class OpenEnv:
    """One session."""

    def __init__(self, url: str, action: str = "message", observation: str = "text") -> None:
        """
        Args:
          url: address of the server.
          action: field of an action that takes the policy's text.
          observation: field of an observation that the policy reads.
        """
        from openenv.core.generic_client import GenericEnvClient

        self.client = GenericEnvClient(base_url=url).sync()
        self.action, self.observation = action, observation

    def reset(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """Resets with the row's `reset` as arguments, if it has one. The observation is the first message."""
        result = self.client.reset(**(row.get("reset") or {}))
        return [{"role": "user", "content": str(result.observation[self.observation])}]

    def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]], float | None, bool]:
        """Takes one action."""
        result = self.client.step({self.action: message["content"]})
        messages = [{"role": "user", "content": str(result.observation[self.observation])}]
        return [] if result.done else messages, result.reward, bool(result.done)

    def close(self) -> None:
        """Closes the session."""
        self.client.close()
