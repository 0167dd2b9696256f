"""A taskset of verifiers with one answer: the sum of two numbers."""

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    """A question and its answer."""

    answer: str


class Sum(vf.Task[SumData]):
    """The last reply is the sum."""

    @vf.reward
    async def right(self, task: SumData, trace: vf.Trace) -> float:
        """1 for the sum alone."""
        return float((trace.last_reply or "").strip() == task.answer)

    @vf.reward(weight=-0.01)
    async def length(self, trace: vf.Trace) -> float:
        """A hundredth off for each character."""
        return float(len(trace.last_reply or ""))


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    """Sums of two digits."""

    def load(self):
        """The tasks."""
        for a in range(10):
            for b in range(10):
                yield Sum(SumData(prompt=f"{a}+{b}=", answer=str(a + b)), self.config.task)
