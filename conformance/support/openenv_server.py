"""A real OpenEnv server of the number game on loopback, with sessions side by side: python openenv_server.py PORT."""

import sys

import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    message: str


class Heard(Observation):
    text: str = ""


class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.secret = 0

    def reset(self, seed=None, episode_id=None, secret: int = 0, **_) -> Heard:
        self.secret = secret
        return Heard(text="guess")

    def step(self, action: Say, timeout_s=None, **_) -> Heard:
        right = action.message == str(self.secret)
        hint = "higher" if action.message < str(self.secret) else "lower"
        return Heard(text="right" if right else hint, reward=1.0 if right else -0.1, done=right)

    @property
    def state(self) -> State:
        return State()


if __name__ == "__main__":
    app = create_fastapi_app(Game, Say, Heard, max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
