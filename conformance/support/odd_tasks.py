"""A taskset of verifiers that fails when it is asked to."""

import asyncio
import time

import verifiers.v1 as vf

__all__ = ["Odds"]


class Odd(vf.Task[vf.TaskData]):
    @vf.reward
    async def fine(self, trace: vf.Trace) -> float:
        if trace.last_reply == "raise":
            raise ZeroDivisionError("of the task")
        if trace.last_reply == "hang":
            time.sleep(1000)
        if trace.last_reply == "wait":
            await asyncio.sleep(1000)
        return 1.0


class Odds(vf.Taskset[Odd, vf.TasksetConfig]):
    def load(self):
        for number in range(2):
            yield Odd(vf.TaskData(prompt=f"say {number}"), self.config.task)
