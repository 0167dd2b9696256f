"""A verifiers taskset with a tool: products, and a calculator in a tool server that all rollouts share."""

import verifiers.v1 as vf

__all__ = ["Products"]


class Calculator(vf.Toolset[vf.SharedToolsetConfig]):
    """A tool server with one tool."""

    TOOL_PREFIX = None

    @vf.tool
    async def multiply(self, a: int, b: int) -> str:
        """Multiplies two whole numbers."""
        return str(a * b)


class ProductData(vf.TaskData):
    """A question and its answer."""

    answer: str


class Product(vf.Task[ProductData]):
    """Answer with the product."""

    @vf.reward
    async def right(self, task: ProductData, trace: vf.Trace) -> float:
        """1 if the reply is exactly the product."""
        return float((trace.last_reply or "").strip() == task.answer)

    @vf.reward(weight=0.25)
    async def called(self, trace: vf.Trace) -> float:
        """0.25 for a call of the tool."""
        return float(any(message.role == "tool" for message in trace.messages))


class Products(vf.Taskset[Product, vf.TasksetConfig]):
    """Products of two numbers with two digits."""

    def load(self):
        """The tasks."""
        for a, b in ((26, 81), (17, 35), (42, 58), (63, 94)):
            yield Product(ProductData(prompt=f"{a}*{b}=", answer=str(a * b)), self.config.task)

    @classmethod
    def toolsets(cls, config: vf.TasksetConfig) -> list[vf.Toolset]:
        """The tool server, shared by all rollouts of a process."""
        return [Calculator(vf.SharedToolsetConfig())]


if __name__ == "__main__":
    Calculator.run()  # verifiers starts the server this way
