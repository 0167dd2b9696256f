"""Finds reward functions by name or path, reads their signatures, and calls them."""

import copy
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import os
import site
import sys
import sysconfig
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from .all_builtin import BUILTIN

OWN = ("prompts", "completions", "completion_ids")  # arguments from gvpo; data columns of these names are not passed
LONGEST_ERROR = 2000  # characters of an error's text
_loaded: dict[str, tuple[tuple[int, int], Any]] = {}  # path -> (time of change, size), module


@dataclass(frozen=True)
class Signature:
    """The arguments that a reward function takes."""

    names: list[str]  # parameters by name
    required: list[str]  # those without a default
    any: bool  # has **kwargs
    bound: list[str]  # parameters already bound, such as `self`: they cannot be passed by keyword
    answer_option: str | None = None  # of a built-in reward: the option that names its column, passed as `answer`
    runs_code: bool = False
    settings: tuple[str, ...] = ()  # of a built-in reward: parameters that only options set, never a column
    built_in: bool = False
    fields: tuple[str, ...] = ()  # of a built-in reward: columns that its options name


def find_function(spec: str, kind: str = "function", built_in: Mapping[str, Any] = BUILTIN) -> Callable[..., Any]:
    """Finds a built-in by name, or imports `package.module:function` or `path/to/file.py:function`.

    Args:
      kind: the word for it in messages: function or class.
    Raises: LookupError: no such file, module or function, or its import failed; the message has the reason.
    """
    if spec in built_in:
        return built_in[spec]  # type: ignore[no-any-return]
    where, colon, attribute = spec.rpartition(":")
    where = os.path.expanduser(where)
    if not colon or not where or not attribute:
        one_of = f"one of {', '.join(built_in)}, " if built_in else ""
        raise LookupError(f"expected {one_of}package.module:{kind} or file.py:{kind}")
    try:
        module = _from_file(where) if where.endswith(".py") else _from_name(where)
    except LookupError as e:
        if type(e) is LookupError:
            raise
        raise LookupError(f"importing {where} failed: {described_error(e)}") from e
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # also SystemExit: a script may call sys.exit on import
        raise LookupError(f"importing {where} failed: {described_error(e)}") from e
    function = getattr(module, attribute, None)
    if not callable(function):
        raise LookupError(f"{where} has no {kind} {attribute}")
    return function  # type: ignore[no-any-return]


def described_error(error: BaseException) -> str:
    """The type and text of an error from user code, with bounded length. Works even if str(error) fails."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be read)"
    return f"{type(error).__name__}: {text}"[:LONGEST_ERROR]


def end_of_traceback(error: BaseException) -> str:
    """The last lines of the traceback that Python would print."""
    return "".join(traceback.format_exception(error)[-3:])[-2 * LONGEST_ERROR :]


def _from_file(path: str) -> Any:
    """Imports a file as a module that other modules and processes can import by its name.

    Its folder is added to sys.path, as for a script. A file that has changed is loaded again.
    """
    if not os.path.isfile(path):
        raise LookupError(f"there is no file {path}")
    path = os.path.abspath(path)
    facts = os.stat(path)
    version = (facts.st_mtime_ns, facts.st_size)
    if path in _loaded and _loaded[path][0] == version:
        return _loaded[path][1]
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.stdlib_module_names or _is_taken(name, path):
        name = f"{name}_{zlib.crc32(path.encode()):08x}"  # the plain name belongs to another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _onto_path(os.path.dirname(path))
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    _loaded[path] = (version, module)
    return module


def _is_taken(name: str, path: str) -> bool:
    """Whether `import name` would give another file: an imported module or an installed package."""
    if name in sys.modules:
        return os.path.abspath(getattr(sys.modules[name], "__file__", None) or "") != path
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # an invalid name, or a finder that fails
        return True
    return spec is not None and os.path.abspath(spec.origin or "") != path


def _from_name(name: str) -> Any:
    _onto_path(os.getcwd())  # not on the path of a console script, but users keep rewards there
    return importlib.import_module(name)


def _onto_path(folder: str) -> None:
    """Inserts a folder into sys.path after the standard library, which it must not shadow, and before packages."""
    if folder in sys.path:
        return
    paths = sysconfig.get_paths()
    installed = {*site.getsitepackages(), site.getusersitepackages(), paths["purelib"], paths["platlib"]}
    first = next((i for i, entry in enumerate(sys.path) if entry in installed), len(sys.path))
    sys.path.insert(first, folder)
    importlib.invalidate_caches()


def warm_up(function: Any, options: Mapping[str, Any]) -> None:
    """Calls the `warm_up` of a built-in function, if it has one. Passes the options if it takes an argument.

    Raises: LookupError, ImportError: the function cannot work, with these options or at all.
    """
    start = getattr(function, "warm_up", None)
    if start is None or not _is_built_in(function):  # a user's object may have a method of this name
        return
    try:
        start(*([options] if inspect.signature(start).parameters else []))
    except (TypeError, ValueError) as e:
        raise LookupError(f"its options cannot be used: {e}") from e


def _is_built_in(function: Any) -> bool:
    return any(function is reward for reward in BUILTIN.values())


def signature_of(function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> Signature:
    """The function's signature.

    Args:
      options: settings of the reward; those of a built-in reward may name columns.
    Raises: LookupError: the signature cannot be read.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as e:
        raise LookupError(f"its arguments cannot be read ({e}); wrap it in a Python function") from e
    builtin_reward = function if _is_built_in(function) else None  # a user's object may have attributes of these names
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return Signature(
        names=[p.name for p in named],
        required=[p.name for p in named if p.default is p.empty],
        any=any(p.kind is p.VAR_KEYWORD for p in parameters),
        bound=list(_bound(function)),
        answer_option=getattr(builtin_reward, "answer_option", None),
        runs_code=isinstance(code := getattr(function, "runs_code", False), int) and bool(code),
        built_in=builtin_reward is not None,
        settings=tuple(getattr(builtin_reward, "settings", ())),
        fields=tuple(builtin_reward.fields(options or {}))
        if builtin_reward is not None and hasattr(builtin_reward, "fields")
        else (),
    )


def _bound(function: Any) -> Iterator[str]:
    """Parameters that an instance or functools.partial has already bound."""
    if isinstance(function, functools.partial):
        yield from list(inspect.signature(function.func).parameters)[: len(function.args)]
        yield from _bound(function.func)
    elif inspect.ismethod(function):
        yield from list(inspect.signature(function.__func__).parameters)[:1]
    elif inspect.isclass(function):
        yield "self"
    elif not inspect.isroutine(function):
        yield from _bound(function.__call__)


def wanted_columns(signature: Signature, columns: Collection[str], options: Mapping[str, Any]) -> list[str]:
    """The columns to pass: those that the function names, or all if it has **kwargs; none that options set."""
    if signature.answer_option:
        return [name for name in (_answer_column(signature, options),) if name in columns]
    excluded = {*options, *OWN[:2], *signature.settings}
    parameter_names = {*signature.names}
    return [
        c
        for c in columns
        if c not in excluded and (c in parameter_names or (signature.any and c not in signature.bound))
    ]


def _answer_column(signature: Signature, options: Mapping[str, Any]) -> str:
    assert signature.answer_option is not None
    return str(options.get(signature.answer_option, "answer"))


def wrong_arguments(signature: Signature, columns: Collection[str] | None, options: Mapping[str, Any]) -> str | None:
    """Why a call would fail; None if it would not.

    Args:
      columns: names of the data's columns; None: unknown, so they are not checked.
    """
    names = [n for n in signature.names if n not in OWN]
    for option in options:
        if option in OWN:
            return f"options.{option}: gvpo passes {option} itself; give the option another name"
        any_option = signature.any and not signature.built_in  # a built-in's **kwargs are columns
        if option in signature.bound or not (any_option or option in signature.names):
            takes = ", ".join(names) or "none besides prompts and completions"
            close = difflib.get_close_matches(option, names, n=1)
            suggestion = f"; did you mean {close[0]}?" if close else ""
            return f"options.{option}: the function takes no argument {option} (it takes: {takes}){suggestion}"
    available = ", ".join(sorted(set(columns or ()) - {*OWN})) or "none"
    if signature.answer_option:
        column = _answer_column(signature, options)
        if columns is not None and column not in columns:
            return f"the data has no column {column!r} (it has: {available}); set options.{signature.answer_option}"
        return None
    if not (signature.any or {"completions", "completion_ids"} & {*signature.names}):
        return (
            f"the function takes ({', '.join(signature.names)}) and no responses; expected reward(prompts, completions,"
            " **columns), and may leave out arguments that it does not use"
        )
    for name in signature.required:
        if name in signature.settings and name not in options:
            return f"options.{name} is missing; the reward needs it"
    if columns is not None:
        for name in signature.fields:
            if name not in columns:
                return f"the options name the column {name!r}, which the data does not have (it has: {available})"
        for name in signature.required:
            if name not in (*OWN, *columns, *options):
                return (
                    f"the function needs an argument {name!r}, and the data has no column of that name (it has:"
                    f" {available}); rename the argument or the column, give it a default, or set it in options"
                )
    return None


def call(
    function: Callable[..., Any],
    prompts: Any,
    completions: Any,
    columns: Mapping[str, Any],
    options: Mapping[str, Any],
    run: Callable[[Any], Any],
) -> Any:
    """Calls the function for one batch and returns its result.

    Args:
      run: waits for an awaitable on the event loop that all calls share.
    """
    signature, options = signature_of(function), own_copy(dict(options))
    if wrong := wrong_arguments(signature, columns, options):
        raise TypeError(wrong)
    if signature.answer_option:
        columns = {"answer": columns[_answer_column(signature, options)]}
        options = {name: value for name, value in options.items() if name != signature.answer_option}
        value = function(list(completions), **columns, **options)
        return run(value) if inspect.isawaitable(value) else value
    values = {name: list(columns[name]) for name in wanted_columns(signature, columns, options)}
    values |= {"prompts": list(prompts), "completions": list(completions), **options}
    by_place = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:  # the default fills a missing one
            by_place.append(values.pop(parameter.name, parameter.default))
    chosen = {k: v for k, v in values.items() if k in signature.names or (signature.any and k not in signature.bound)}
    value = function(*by_place, **chosen)
    return run(value) if inspect.isawaitable(value) else value


def own_copy(value: Any) -> Any:
    """Copies lists, tuples, mappings, sets and arrays, also nested ones; does not copy other objects."""
    kind = type(value)
    if kind in (list, tuple):
        same = {*map(type, value)} <= {int, float, str, bool, type(None)}
        return kind(value) if same else kind(own_copy(item) for item in value)
    if kind is dict:
        return {key: own_copy(item) for key, item in value.items()}
    return copy.copy(value) if kind in (set, bytearray) or kind.__name__ == "ndarray" else value


def plain(values: Any, count: int) -> Any:
    """A result as JSON: numbers and None unchanged, anything else as {"text", "type"} for the error message.

    Sets are rejected because they have no order, and DataFrames because they iterate over their column names. A result
    of a wrong length becomes {"count": its length}, so that the size of the answer is bounded.
    """
    if isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set) or hasattr(values, "columns"):
        return _described(values)
    try:
        length = len(values)
    except TypeError:  # a generator, or an array without an axis
        return _described(values)
    numbers = [_number(v) for v in itertools.islice(values, count + 1)] if length == count else []
    return numbers if len(numbers) == count else {"count": length if length != count else len(numbers)}


def _number(value: Any) -> Any:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except OverflowError:
        return float("inf")
    except (TypeError, ValueError):
        return _described(value)


def _described(value: Any) -> dict[str, str]:
    try:
        text = str(value)
    except Exception:
        text = "(its text cannot be read)"
    return {"text": text[:200], "type": type(value).__name__[:80]}
