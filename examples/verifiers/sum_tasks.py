"""A verifiers taskset with single answers: sums of two numbers."""

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    """A question and its answer."""

    answer: str


class Sum(vf.Task[SumData]):
    """Answer with the sum."""

    @vf.reward
    async def right(self, task: SumData, trace: vf.Trace) -> float:
        """1 if the reply is exactly the sum."""
        return float((trace.last_reply or "").strip() == task.answer)

    @vf.reward(weight=-0.01)
    async def length(self, trace: vf.Trace) -> float:
        """Minus 0.01 for each character."""
        return float(len(trace.last_reply or ""))


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    """Sums of two digits."""

    def load(self):
        """The tasks."""
        for a in range(10):
            for b in range(10):
                yield Sum(SumData(prompt=f"{a}+{b}=", answer=str(a + b)), self.config.task)
