"""Encodes values of a data column as JSON that decodes to equal values of the same types. Imports nothing of gvpo.

Values that JSON supports are unchanged, also in lists. Everything else becomes an object with one key, its tag:
`{"tuple": [...]}`, `{"dict": [[key, value], ...]}`. Types are matched exactly: a subclass (an enum, a named tuple) is
rejected, because it would arrive as its base class. Unlike pickle, decoding executes nothing.
"""

import base64
import collections
import datetime
import decimal
import fractions
import uuid
import zoneinfo
from collections.abc import Callable
from typing import Any

LARGEST_REWARD = 3.4e38
"""Largest magnitude of a score: float32 can hold it, and float64 can sum its squares."""
DEEPEST = 100  # levels of nesting; the JSON parser is recursive
_LARGEST = 2**63  # larger integers are written in hexadecimal: Python limits decimal text, and it is slow
_PLAIN = {type(None), bool, int, float, str}
_LISTS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
}
_DICTS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "Counter": lambda pairs: collections.Counter(dict(pairs)),
}
_TEXTS: dict[type, tuple[str, Callable[[Any], str]]] = {
    bytes: ("bytes", lambda v: base64.b64encode(v).decode()),
    bytearray: ("bytearray", lambda v: base64.b64encode(v).decode()),
    decimal.Decimal: ("Decimal", str),
    fractions.Fraction: ("Fraction", lambda v: f"{v.numerator:x}/{v.denominator:x}"),
    datetime.date: ("date", lambda v: v.isoformat()),
    uuid.UUID: ("UUID", str),
}
_NUMPY_KINDS = "biufcSUmM"  # no objects, records or extension types


class UnsendableError(ValueError):
    """A value would not arrive equal; the message says which and why."""


def encode(value: Any, depth: int = 0) -> Any:
    """The value as JSON. Raises: UnsendableError."""
    kind = type(value)
    if kind is int and not -_LARGEST <= value < _LARGEST:
        return {"int": hex(value)}
    if kind in _PLAIN:
        return value
    if depth >= DEEPEST:
        raise UnsendableError(f"it nests deeper than {DEEPEST} levels")
    if kind is list:
        return value if _as_it_is(value) else [encode(v, depth + 1) for v in value]
    name = kind.__name__
    if kind in (tuple, set, frozenset) or (kind is collections.deque and value.maxlen is None):
        return {name: [encode(v, depth + 1) for v in value]}
    if kind in (dict, collections.OrderedDict, collections.Counter):
        return {name: [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    if kind in _TEXTS:
        name, text = _TEXTS[kind]
        return {name: text(value)}
    if kind in (datetime.datetime, datetime.time):
        return {name: [value.replace(tzinfo=None).isoformat(), _zone(value.tzinfo), value.fold]}
    if kind is datetime.timedelta:
        return {"timedelta": [value.days, value.seconds, value.microseconds]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [encode(v) for v in (value.start, value.stop, value.step)]}
    if kind.__module__ == "numpy":
        return _encode_numpy(value, kind, depth)
    if kind.__module__.partition(".")[0] == "pandas" and name == "Timestamp":
        count = value.asm8.view("i8")  # in its own unit: years beyond 2262 do not fit into nanoseconds
        return {"Timestamp": [int(count), value.unit, _zone(value.tzinfo)]}
    raise UnsendableError(f"it holds a {kind.__module__}.{kind.__qualname__}")


def decode(value: Any) -> Any:
    """Returns the value that was given to `encode`."""
    if type(value) is list:
        return value if _PLAIN.issuperset(map(type, value)) else [decode(v) for v in value]
    if type(value) is not dict:
        return value
    ((tag, content),) = value.items()
    if tag in _LISTS:
        return _LISTS[tag](decode(content))
    if tag in _DICTS:
        return _DICTS[tag]((decode(k), decode(v)) for k, v in content)
    return _DECODERS[tag](content)


def _as_it_is(values: list[Any]) -> bool:
    """Whether JSON preserves this list. Long lists of token ids are checked without a Python loop."""
    kinds = set(map(type, values))
    if not kinds <= _PLAIN:
        return False
    if int not in kinds:
        return True
    numbers = values if kinds <= {int, float, bool} and float not in kinds else [v for v in values if type(v) is int]
    return min(numbers) >= -_LARGEST and max(numbers) < _LARGEST


def _zone(zone: Any) -> Any:
    if zone is None:
        return None
    if type(zone) is datetime.timezone:
        offset = zone.utcoffset(None)
        name = zone.tzname(None)
        return [offset.total_seconds(), None if name == datetime.timezone(offset).tzname(None) else name]
    if type(zone) is zoneinfo.ZoneInfo and zone.key:
        return zone.key
    raise UnsendableError(f"it holds the time zone {zone!r} ({type(zone).__module__}.{type(zone).__qualname__})")


def _zone_of(content: Any) -> Any:
    if content is None:
        return None
    if isinstance(content, str):
        return zoneinfo.ZoneInfo(content)
    seconds, name = content
    offset = datetime.timedelta(seconds=seconds)
    return datetime.timezone(offset) if name is None else datetime.timezone(offset, name)


def _encode_numpy(value: Any, kind: type, depth: int) -> Any:
    import numpy as np

    if kind is np.ndarray and value.dtype == np.dtype(object):
        return {"objects": [list(value.shape), [encode(v, depth + 1) for v in value.ravel().tolist()]]}
    if kind is not np.ndarray and not issubclass(kind, np.generic):
        raise UnsendableError(f"it holds a numpy.{kind.__name__}")
    if kind in (np.str_, np.bytes_):  # arrays would drop trailing NUL characters
        text = (str if kind is np.str_ else bytes).__getitem__(value, slice(None))
        return {kind.__name__: encode(text)}
    dtype = value.dtype
    if dtype.kind not in _NUMPY_KINDS or dtype.metadata:
        raise UnsendableError(f"it holds a numpy.{kind.__name__} of dtype {dtype}")
    content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"array" if kind is np.ndarray else "scalar": [dtype.str, list(value.shape), content]}


def _array(content: Any) -> Any:
    import numpy as np

    dtype, shape, data = content
    array = np.empty(shape, np.dtype(dtype))
    array.reshape(-1).view(np.uint8)[...] = np.frombuffer(base64.b64decode(data), np.uint8)
    return array


def _scalar(content: Any) -> Any:
    return _array(content)[()]


def _numpy_text(name: str, content: Any) -> Any:
    import numpy as np

    return getattr(np, name)(decode(content))


def _objects(content: Any) -> Any:
    import numpy as np

    shape, items = content
    array = np.empty(len(items), object)
    for i, item in enumerate(items):
        array[i] = decode(item)
    return array.reshape(shape)


def _timestamp(content: Any) -> Any:
    import numpy as np
    import pandas

    count, unit, zone = content
    moment = pandas.Timestamp(np.datetime64(count, unit))
    return moment if zone is None else moment.tz_localize("UTC").tz_convert(_zone_of(zone))


def _fraction(content: str) -> fractions.Fraction:
    return fractions.Fraction(*(int(part, 16) for part in content.split("/")))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "bytes": base64.b64decode,
    "bytearray": lambda content: bytearray(base64.b64decode(content)),
    "Decimal": decimal.Decimal,
    "Fraction": _fraction,
    "date": datetime.date.fromisoformat,
    "UUID": uuid.UUID,
    "datetime": lambda c: datetime.datetime.fromisoformat(c[0]).replace(tzinfo=_zone_of(c[1]), fold=c[2]),
    "time": lambda c: datetime.time.fromisoformat(c[0]).replace(tzinfo=_zone_of(c[1]), fold=c[2]),
    "timedelta": lambda c: datetime.timedelta(*c),
    "complex": lambda c: complex(*c),
    "range": lambda c: range(*map(decode, c)),
    "str_": lambda content: _numpy_text("str_", content),
    "bytes_": lambda content: _numpy_text("bytes_", content),
    "array": _array,
    "scalar": _scalar,
    "objects": _objects,
    "Timestamp": _timestamp,
}
