"""Compiled programs. Each is compiled once per argument shapes, kept, counted, and called without tracing."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax

_ADVICE = "lower optimizer.micro_batch_tokens, set model.gradient_checkpointing, or raise model.mesh_fsdp"
_HOLDING = "raise model.mesh_fsdp or model.mesh_tensor, or train adapters with model.lora_rank"
_kept: dict[Hashable, Any] = {}  # shared by all policies of this process, so that equal programs are compiled once


class OutOfMemoryError(RuntimeError):
    """A program does not fit into the device's memory; the message says which setting to lower."""


@contextlib.contextmanager
def out_of_memory(what: str, advice: str = _HOLDING) -> Iterator[None]:
    """Turns the device's out-of-memory error into one line: what did not fit, and what to do.

    Args:
      advice: what to do. Default: advice for arrays that a run holds from start to end.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:300]
        raise OutOfMemoryError(f"out of memory in {what}: {advice} ({reason})") from error


class Programs:
    """The programs of one policy."""

    def __init__(self) -> None:
        self.used: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self.used)

    def call(
        self,
        function: Callable[..., Any],
        static: tuple[Hashable, ...],
        *arguments: Any,
        donate: Sequence[int] = (),
        out: Any = None,
        advice: str = "",
    ) -> Any:
        """function(*static, *arguments), compiled.

        Args:
          function: must be the same object at every call, so a function of a module.
          donate: positions in `arguments` whose buffers the result may reuse.
          out: shardings of the result, in the form that jax.jit takes. Default: the compiler chooses.
          advice: what to lower if memory runs out.
        """
        leaves, tree = jax.tree.flatten(arguments)
        key = (function, static, tree, tuple((x.shape, x.dtype, x.weak_type, x.sharding) for x in leaves))
        with out_of_memory(function.__name__, advice or _ADVICE):
            if key not in self.used:
                if key not in _kept:
                    _kept[key] = compile_program(function, static, *arguments, donate=donate, out=out)
                self.used[key] = _kept[key]
            return self.used[key](*arguments)


def compile_program(
    function: Callable[..., Any],
    static: tuple[Hashable, ...],
    *arguments: Any,
    donate: Sequence[int] = (),
    out: Any = None,
) -> Any:
    """Compiles function(*static, *arguments) ahead of time, for arrays or their `jax.ShapeDtypeStruct`."""

    def program(*given: Any) -> Any:
        return function(*static, *given)

    program.__name__ = function.__name__
    return jax.jit(program, donate_argnums=tuple(donate), out_shardings=out).lower(*arguments).compile()
