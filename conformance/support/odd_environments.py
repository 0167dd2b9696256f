"""Environments and tools of careless users; imported in worker processes."""

import asyncio
import datetime
import os
import sys
import time


def defaults(a: int, b: int = 4) -> int:
    """Adds."""
    return a + b


def give(what: str) -> object:
    """Gives values of many kinds."""
    values = {
        "none": None,
        "text": "é\n",
        "dict": {"größe": [1, 2.5]},
        "date": datetime.date(2024, 2, 29),
        "half": "a\ud800",
        "long": "x" * 100_000,
    }
    if what == "exit":
        sys.exit(3)
    if what == "raise":
        raise KeyError("\ud800")
    return values[what]


_waiting = 0


async def together(count: int) -> int:
    """Waits until `count` calls wait."""
    global _waiting
    _waiting += 1
    while _waiting < count:
        await asyncio.sleep(0.001)
    return _waiting


def bare(a, b=1):
    """Has no types."""
    return a


class Kinds:
    """Tools of all kinds of methods."""

    tools = ("static", "of_class", "own", defaults)

    def reset(self, row):
        self.said = 0

    def step(self, message):
        return [], 1.0, True

    @staticmethod
    def static(a: int) -> int:
        """Gives it back."""
        return a

    @classmethod
    def of_class(cls, a: int) -> str:
        """Says its class."""
        return f"{cls.__name__} {a}"

    def own(self, a: int) -> int:
        """Counts."""
        self.said += a
        return self.said


class OneName(Kinds):
    tools = "own"


class Says:
    """Answers what it is told to: the wrong and the odd."""

    def reset(self, row):
        if row.get("secret") == "unborn":
            raise OSError("no such game")

    def step(self, message):
        said = message["content"]
        if said == "numpy":
            import numpy as np

            return [], np.float32(0.5), np.bool_(True)
        if said in ("nan", "-1e308"):
            return [], float(said), True
        if said == "half":
            return [{"role": "user", "content": "a\ud800"}], None, False
        if said == "object":
            return [{"role": "user", "content": "a", "time": datetime.date(2024, 2, 29)}], None, False
        if said == "large":
            return [{"role": "user", "content": "x" * (5 * 2**20)}], None, False
        if said == "empty":
            return [], 1.0, False
        if said == "parts":
            return [{"role": "user", "content": [{"type": "text", "text": "a"}]}], None, False
        if said == "mute":
            return None
        if said == "raise":
            raise ValueError("silent")
        if said == "role":
            return [{"role": "oracle", "content": "a"}], None, False
        return [{"role": "user", "content": "é 🂡" if said == "hello" else "and?"}], 0.25, False


class Sized(Says):
    def __init__(self, size: int) -> None:
        self.size = size


class Open(Says):
    """Cannot be closed."""

    def close(self):
        raise OSError("still open")


class Patient(Says):
    """The same, async."""

    async def step(self, message):
        await asyncio.sleep(0)
        return super().step(message)


class Slow(Says):
    """Writes a line for each step and then takes its time: a run can be killed within."""

    def step(self, message):
        with open(os.environ["GVPO_TEST_STEPS"], "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.02)
        return [{"role": "user", "content": "and?"}], float(len(message["content"])), False
