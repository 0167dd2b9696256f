"""Array functions that the Array API standard lacks, and the checks of the core's arguments."""

import sys
from collections.abc import Mapping
from typing import Any

import array_api_compat
import numpy as np

Array = Any  # any Array API array; the standard defines no type for it


def namespace(x: Any) -> Any:
    """Returns the Array API namespace of an array.

    Raises: TypeError: not an array of any known library, or a masked array.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):  # torch.compile cannot trace the cached look-up below
        if isinstance(x, torch.masked.MaskedTensor):
            raise TypeError("got a MaskedTensor; expected a tensor without a mask: pass `valid`, or NaN as the reward")
        if x.is_nested:
            raise TypeError("got a nested tensor; expected a dense one: use torch.nested.to_padded_tensor")
        if x.layout is not torch.strided:
            raise TypeError(f"got a tensor of layout {x.layout}; expected a dense one: use x.to_dense()")
        from array_api_compat import torch as torch_namespace

        return torch_namespace
    if not array_api_compat.is_array_api_obj(x):
        raise TypeError(f"got a {type(x).__name__}; expected an array (numpy, torch, jax, mlx, ...)")
    if isinstance(x, np.ma.MaskedArray):  # array functions drop the mask and read what is under it
        raise TypeError(
            "got a numpy masked array; expected an array without a mask: pass `valid`, or NaN as the reward"
        )
    return array_api_compat.array_namespace(x)


def is_jax_array(x: Any) -> bool:
    """Returns whether x is a JAX array. Tests for tensors first: torch.compile cannot trace the cached look-up."""
    return not hasattr(x, "detach") and array_api_compat.is_jax_array(x)


def stop_gradient(x: Array) -> Array:
    """Returns the same values as constants under differentiation. The standard has no such function."""
    if hasattr(x, "detach"):  # torch
        return x.detach()
    if is_jax_array(x):
        return sys.modules["jax"].lax.stop_gradient(x)
    xp = namespace(x)
    return xp.stop_gradient(x) if hasattr(xp, "stop_gradient") else x  # mlx; the other libraries do not differentiate


def explicit_mesh(x: Array) -> Any:
    """Returns the mesh of a JAX array if it has Explicit axes, the default of jax.make_mesh, and None otherwise.

    On such a mesh the caller must name the sharding of the results of gathers and scatters.
    """
    if not is_jax_array(x):
        return None
    jax = sys.modules["jax"]
    if not hasattr(jax, "typeof"):  # older JAX: array types have no sharding
        return None
    mesh = jax.typeof(x).sharding.mesh
    return mesh if any(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types) else None


def _explicit_spec(x: Array) -> tuple[Any, ...]:
    """Returns how a JAX array is split over the Explicit axes of its mesh; () if it is not."""
    if explicit_mesh(x) is None:
        return ()
    spec = tuple(sys.modules["jax"].typeof(x).sharding.spec)
    return spec if any(part is not None for part in spec) else ()


def take_rows(values: Array, ids: Array) -> Array:
    """Returns values[ids] along axis 0, on an Explicit mesh with the sharding of `ids`."""
    if explicit_mesh(ids) is not None:
        return values.at[ids].get(out_sharding=sys.modules["jax"].typeof(ids).sharding)
    return namespace(values).take(values, ids, axis=0)


def scatter_options(values: Array) -> dict[str, Any]:
    """Returns the arguments of a JAX scatter of rows into groups: on an Explicit mesh every device holds all groups."""
    mesh = explicit_mesh(values)
    if mesh is None:
        return {}
    sharding = sys.modules["jax"].sharding
    return {"out_sharding": sharding.NamedSharding(mesh, sharding.PartitionSpec())}


def constant(number: Any) -> Any:
    """Returns a number unchanged, and a 0-d array without its gradient."""
    return number if isinstance(number, int | float) else stop_gradient(number)


def concrete(x: Any) -> float | None:
    """Returns the value of a 0-d array, or None while a compiler traces it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling():
        return None
    try:
        return float(x)
    except Exception:  # each library has its own tracing error, and the core imports none of them
        return None


def wide_dtype(xp: Any, *arrays: Array) -> Any:
    """Returns the dtype to compute in: the widest floating dtype among `arrays`, at least float32."""
    # not result_type: torch.compile cannot trace it for 16-bit dtypes
    floats = [x.dtype for x in arrays if xp.isdtype(x.dtype, "real floating")]
    return max([xp.float32, *floats], key=lambda dtype: xp.finfo(dtype).bits)


_KINDS = {"group_ids": "integral", "valid": "bool", "mask": "bool"}
_REAL = ("bool", "integral", "real floating")


def check_rows(
    rows: Mapping[str, Array], *, floating: bool = True, tokens: bool = False, **others: Array | None
) -> Any:
    """Checks that arrays have one shape and come from one library; returns their namespace.

    Args:
      rows: name -> (N,) real array; the first must be floating, unless `floating` is False.
      tokens: the arrays are (N, T), and N may be 0.
      others: `group_ids` (integer), `mask` (bool) and `valid` (bool, or None), of the same shape.
    Raises: TypeError: not an array, another library, or a wrong dtype.
      ValueError: a wrong shape, N = 0, another device, another sharding over Explicit axes of a JAX mesh.
    """
    arrays = {**rows, **{name: x for name, x in others.items() if name != "valid" or x is not None}}
    first, *rest = arrays
    spaces = {}
    for name, x in arrays.items():
        try:
            spaces[name] = namespace(x)
        except TypeError as e:
            raise TypeError(f"{name}: {e}") from None
    xp = spaces[first]
    if not xp.isdtype(arrays[first].dtype, "real floating" if floating else _REAL):
        raise TypeError(
            f"{first} has dtype {arrays[first].dtype}; expected a {'floating' if floating else 'real'} dtype"
        )
    if len(arrays[first].shape) != (2 if tokens else 1):
        wanted = "(N, T)" if tokens else "(N,), one number a response"
        raise ValueError(f"{first} has shape {tuple(arrays[first].shape)}; expected {wanted}")
    if arrays[first].shape[0] == 0 and not tokens:
        raise ValueError(f"{first} has shape (0,); expected at least one response")
    for name in rest:
        x = arrays[name]
        if spaces[name] is not xp:
            raise TypeError(f"{name} is an array of {spaces[name].__name__}; expected {xp.__name__}, as {first}")
        if tuple(x.shape) != tuple(arrays[first].shape):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {tuple(arrays[first].shape)}, as {first}")
        if hasattr(x, "get_device") and x.device != arrays[first].device:  # torch
            raise ValueError(f"{name} is on {x.device}; expected {arrays[first].device}, as {first}")
        if name != "group_ids" and _explicit_spec(x) != _explicit_spec(arrays[first]):  # ids may be sharded otherwise
            raise ValueError(
                f"{name} is sharded as P{_explicit_spec(x)}, and {first} as P{_explicit_spec(arrays[first])}; expected"
                f" the same on a mesh with Explicit axes: jax.sharding.reshard({name}, jax.typeof({first}).sharding)"
            )
        kind = _KINDS.get(name, _REAL)
        if not xp.isdtype(x.dtype, kind):
            wanted = kind if isinstance(kind, str) else "a real dtype"
            raise TypeError(f"{name} has dtype {x.dtype}; expected {wanted}")
    return xp


def check_number(name: str, value: Any, *, positive: bool = False, finite: bool = True) -> None:
    """Checks that a value is a real number >= 0 (> 0 with `positive`), and finite unless `finite` is False.

    A number that a compiler traces passes.

    Raises: TypeError: not a real number. ValueError: an array of several numbers, or out of range.
    """
    wanted = f"a {'finite ' if finite else ''}number {'> 0' if positive else '>= 0'}"
    if not isinstance(value, int | float):
        try:
            xp = namespace(value)
        except TypeError:
            raise TypeError(f"{name} is {value!r}; expected {wanted}") from None
        if tuple(value.shape) != ():
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {wanted}")
        if not xp.isdtype(value.dtype, _REAL):
            raise TypeError(f"{name} has dtype {value.dtype}; expected {wanted}")
    number = concrete(value)
    if number is None:
        return
    if not (number > 0 or (number == 0 and not positive)) or (finite and number == float("inf")):
        raise ValueError(f"{name} is {number}; expected {wanted}")


def check_beta(beta: Any, *, positive: bool = False) -> None:
    """Checks the KL coefficient; see check_number."""
    check_number("beta", beta, positive=positive)
