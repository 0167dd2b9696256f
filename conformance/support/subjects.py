"""The array libraries under test, each described by the same few members.

Nothing here imports a framework until its subject is loaded, and nothing sets a global of one beyond the context that
a setting runs in.
"""

import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

Function = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    name: str
    namespace: Any
    asarray: Callable[[np.ndarray, str | None], Any]  # (values, dtype name; None keeps integers and bools)
    numpy: Callable[[Any], np.ndarray]  # any of its arrays -> float64
    value_and_grad: Callable[[Function], Function] | None  # of a scalar function, in its first argument
    compile: Callable[[Function], Function] | None
    largest: Callable[[Function, Any], int]  # bytes of the largest array, or of all at once, while f(x) runs
    context: Callable[[str], AbstractContextManager[Any]] = lambda dtype: nullcontext()


WIDE = ("float64", "float32")
DTYPES = {
    "numpy": (*WIDE, "float16"),
    "array-api-strict": WIDE,  # the standard has no 16-bit floats
    "torch": (*WIDE, "bfloat16", "float16"),
    "jax": (*WIDE, "bfloat16", "float16"),
    "mlx": (*WIDE, "bfloat16", "float16"),
    "cupy": (*WIDE, "float16"),
}
COMPILED = ("torch", "jax", "mlx")
DIFFERENTIABLE = ("torch", "jax", "mlx")


def load(name: str) -> Subject:
    """Imports and describes a subject. Raises: ImportError: not installed, or CuPy without a GPU."""
    return {
        "numpy": _numpy,
        "array-api-strict": _strict,
        "torch": _torch,
        "jax": _jax,
        "mlx": _mlx,
        "cupy": _cupy,
    }[name]()


def _traced_peak(function: Function, x: Any) -> int:
    tracemalloc.start()
    try:
        function(x)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _quiet(dtype: str) -> AbstractContextManager[Any]:
    # the cases hold infinities and NaN on purpose, of which NumPy alone warns
    return np.errstate(invalid="ignore", over="ignore", divide="ignore")


def _numpy() -> Subject:
    return Subject(
        name="numpy",
        namespace=np,
        asarray=lambda x, dtype: np.asarray(x, dtype=dtype),
        numpy=lambda x: np.asarray(x, dtype=np.float64),
        value_and_grad=None,
        compile=None,
        largest=_traced_peak,
        context=_quiet,
    )


def _strict() -> Subject:
    import array_api_strict as xp

    # flags last for the process; no other subject reads them
    xp.set_array_api_strict_flags(
        api_version="2024.12", boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )
    return Subject(
        name="array-api-strict",
        namespace=xp,
        asarray=lambda x, dtype: xp.asarray(x, dtype=getattr(xp, dtype) if dtype else None),
        numpy=lambda x: np.array(np.from_dlpack(x), dtype=np.float64),
        value_and_grad=None,
        compile=None,
        largest=_traced_peak,
        context=_quiet,
    )


def _torch() -> Subject:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    # Every compiled closure of one factory counts against one limit, 8 by default. With `fullgraph`, the ninth raises.
    torch._dynamo.config.recompile_limit = 1000

    def value_and_grad(function: Function) -> Function:
        def run(x: Any, *rest: Any) -> tuple[Any, Any]:
            x = x.detach().requires_grad_()
            value = function(x, *rest)
            grad = torch.autograd.grad(value, x)[0] if value.requires_grad else torch.zeros_like(x)
            return value.detach(), grad

        return run

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    self.size = max(self.size, x.numel() * x.element_size())
            return out

    def largest(function: Function, x: Any) -> int:
        with Largest() as mode:
            function(x)
        return mode.size

    return Subject(
        name="torch",
        namespace=torch,
        asarray=lambda x, dtype: torch.tensor(x, dtype=getattr(torch, dtype) if dtype else None),
        numpy=lambda x: x.detach().to(torch.float64).numpy(),
        value_and_grad=value_and_grad,
        compile=lambda f: torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=False),
        largest=largest,
    )


def _jax() -> Subject:
    import jax
    import jax.numpy as jnp

    def largest(function: Function, x: Any) -> int:
        return int(jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes)

    return Subject(
        name="jax",
        namespace=jnp,
        asarray=lambda x, dtype: jnp.asarray(x, dtype=dtype),
        numpy=lambda x: np.asarray(x).astype(np.float64),
        value_and_grad=jax.value_and_grad,
        compile=jax.jit,
        largest=largest,
        context=lambda dtype: jax.enable_x64(dtype == "float64"),
    )


def _mlx() -> Subject:
    import mlx.core as mx

    def numpy(x: Any) -> np.ndarray:
        wide = x if x.dtype in (mx.float32, mx.float64) else x.astype(mx.float32)  # NumPy has no bfloat16
        return np.array(wide).astype(np.float64)

    def largest(function: Function, x: Any) -> int:
        mx.eval(x)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(x))
        return mx.get_peak_memory() - before

    return Subject(
        name="mlx",
        namespace=mx,
        asarray=lambda x, dtype: mx.array(x, dtype=getattr(mx, dtype) if dtype else None),
        numpy=numpy,
        value_and_grad=mx.value_and_grad,
        compile=mx.compile,
        largest=largest,
        context=lambda dtype: mx.stream(mx.cpu) if dtype == "float64" else nullcontext(),  # no float64 on Metal
    )


def _cupy() -> Subject:
    import cupy as cp

    try:
        cp.cuda.runtime.getDeviceCount()
    except cp.cuda.runtime.CUDARuntimeError as e:
        raise ImportError("cupy is installed, but there is no CUDA device") from e

    def largest(function: Function, x: Any) -> int:
        hook = _LargestCupy()
        with hook:
            function(x)
        return hook.size

    class _LargestCupy(cp.cuda.MemoryHook):  # type: ignore[misc]
        name = "Largest"
        size = 0

        def malloc_preprocess(self, **kwargs: Any) -> None:
            self.size = max(self.size, kwargs["size"])

    return Subject(
        name="cupy",
        namespace=cp,
        asarray=lambda x, dtype: cp.asarray(x, dtype=dtype),
        numpy=lambda x: cp.asnumpy(x).astype(np.float64),
        value_and_grad=None,
        compile=None,
        largest=largest,
    )
