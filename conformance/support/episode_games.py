"""Environments and tools of the tests; imported in worker processes."""

import asyncio
import os
import time


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
      a: the first number.
      b: the second one.
    """
    return a + b


def buy(count: int) -> str:
    """Buys pears."""
    return f"{count} pears"


def slow(seconds: float) -> str:
    """Sleeps."""
    time.sleep(seconds)
    return "awake"


def untold(a: int) -> int:
    return a


class Guess:
    """Says higher or lower until the secret is named; every answer costs a tenth."""

    def __init__(self, price: float = 0.1) -> None:
        self.price = price

    def reset(self, row):
        self.secret = row["secret"]
        return [{"role": "user", "content": "guess"}]

    def step(self, message):
        said = message["content"]
        if said == "crash":
            os._exit(7)
        if said == "raise":
            raise ValueError("not a number")
        if said == "hang":
            time.sleep(1000)
        if said == str(self.secret):
            return [], 1.0, True
        hint = "higher" if said < str(self.secret) else "lower"
        return [{"role": "user", "content": hint}], -self.price, False


class Random(Guess):
    """Does not repeat itself."""

    def step(self, message):
        messages, reward, done = super().step(message)
        return [m | {"content": m["content"] + os.urandom(4).hex()} for m in messages], reward, done


class Unlike(Guess):
    """Begins each episode with another message."""

    def reset(self, row):
        super().reset(row)
        return [{"role": "user", "content": os.urandom(4).hex()}]


class Wrong(Guess):
    def step(self, message):
        return "higher", None


class Async(Guess):
    """Waits for others."""

    async def step(self, message):
        await asyncio.sleep(1000 if message["content"] == "hang" else 0.01)
        return super().step(message)


class Shop:
    """Tools of its own, which have a state, and a step beside them."""

    tools = ("buy",)

    def reset(self, row):
        self.bought = 0

    def buy(self, count: int) -> str:
        """Buys apples."""
        self.bought += count
        return f"{self.bought} apples"

    def step(self, message):
        return [], float(self.bought), True


class Counter:
    """Answers the calls of its tool itself, adds up, and scores what a limit cuts by how often it was asked."""

    def __init__(self, name: str = "count", worth: float = 1.0) -> None:
        self.asked, self.worth = 0, worth

    @staticmethod
    async def tool_schemas(name: str = "count", worth: float = 1.0):
        await asyncio.sleep(0)
        parameters = {"type": "object", "properties": {"by": {"type": "integer"}}}
        return [{"type": "function", "function": {"name": name, "description": "Counts.", "parameters": parameters}}]

    async def reset(self, row):
        return [{"role": "user", "content": "count"}]

    async def step(self, message):
        self.asked += sum(call["arguments"]["by"] for call in message["tool_calls"])
        if not message["tool_calls"]:
            return [], float(self.asked), True
        return [{"role": "tool", "content": str(self.asked)}], None, False

    async def at_limit(self, message):
        if message is not None and message["content"].endswith("fail"):
            raise ValueError("no half words")
        if message is not None:
            assert all(call["name"] for call in message["tool_calls"])
        return 100 * self.worth + self.asked + (0.5 if message is None else 0.25)
