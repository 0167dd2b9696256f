"""Collectives of a compiled program, read from its HLO text."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONSTANT = re.compile(r"^%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_OPERATION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r" (" + "|".join(KINDS) + r")(-start)?\((.*)$")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    shape: str  # of the largest array that it gives or takes, as HLO writes it
    bytes: int  # of that array
    runs: int  # in one run of the program, or in one turn of its loop of unknown length
    channel: str  # the parts of one asynchronous collective share it

    @property
    def total(self) -> int:
        return self.bytes * self.runs


def collectives(text: str, *, turn: bool = False) -> list[Collective]:
    """The collectives of a program, those of loops as often as the loop is known to run.

    Args:
      text: `compiled.as_text()`.
      turn: only those of the loops whose number of turns is not known before, one turn of each; a scan inside counts
        as often as it runs.
    """
    computations = dict(_computations(text))
    entry = next(name for name, (first, _) in computations.items() if first)
    shapes = {name: kind for _, lines in computations.values() for name, kind in map(_shape, lines) if name}
    found: dict[str, Collective] = {}
    for number, one in enumerate(_walk(entry, 1, not turn, computations, shapes)):
        name = one.channel or str(-number)
        if name not in found or one.total > found[name].total:
            found[name] = one
    return list(found.values())


def total(found: list[Collective]) -> Counter[str]:
    """Bytes by kind of collective."""
    sums: Counter[str] = Counter()
    for one in found:
        sums[one.kind] += one.total
    return sums


def _computations(text: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    name, first, lines = "", False, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            first, name, lines = bool(match[1]), match[2], []
        elif line == "}" and name:
            yield name, (first, lines)
            name = ""
        elif name:
            lines.append(line.strip())


def _shape(line: str) -> tuple[str, str]:
    match = _OPERATION.match(line)
    return (match[1], match[2].split("(", 1)[0]) if match and not match[2].startswith("(") else ("", "")


def _walk(
    name: str, runs: int, counts: bool, computations: dict[str, tuple[bool, list[str]]], shapes: dict[str, str]
) -> Iterator[Collective]:
    for line in computations[name][1]:
        if (match := _NAME.search(line.split(", metadata=")[0])) and counts:
            operands = " ".join(shapes.get(n, "") for n in re.findall(r"%([\w.\-]+)", match[3].split(")")[0]))
            result = line[: match.start()]
            shape, size = _largest(f"{result} {operands} {match[3].split(')')[0]}")
            if not match[2]:  # of a tuple of pieces, all
                size = max(size, sum(_size(*piece) for piece in _ARRAY.findall(result.split(" = ", 1)[1])))
            channel = _CHANNEL.search(line)
            yield Collective(match[1], shape, size, runs, channel[1] if channel else "")
        called = dict.fromkeys(c for _, c in _CALLED.findall(line))
        for branches in _BRANCHES.findall(line):
            called |= dict.fromkeys(branch.strip().lstrip("%") for branch in branches.split(","))
        loop = " while(" in line
        trips = _trips(line, computations) if loop else 1
        for other in called:
            if match and other in computations and not loop:
                continue  # the addition of an all-reduce
            if other in computations:
                yield from _walk(other, runs * (trips or 1), counts or not trips, computations, shapes)


def _trips(line: str, computations: dict[str, tuple[bool, list[str]]]) -> int:
    """Turns of a loop; 0: known when it runs alone."""
    if known := _TRIPS.search(line):
        return int(known[1])
    lines = computations[dict(_CALLED.findall(line))["condition"]][1]
    constants = {match[1]: int(match[2]) for text in lines if (match := _CONSTANT.match(text))}
    compared = re.search(r"%([\w.\-]+)\), direction=LT", next(text for text in lines if text.startswith("ROOT")))
    return constants.get(compared[1], 0) if compared else 0


def _largest(text: str) -> tuple[str, int]:
    found = [(_size(kind, sizes), f"{kind}[{sizes}]") for kind, sizes in _ARRAY.findall(text)]
    size, shape = max(found, default=(0, ""))
    return shape, size


def _size(kind: str, sizes: str) -> int:
    count = 1
    for size in filter(None, sizes.split(",")):
        count *= int(size)
    return count * _BYTES[kind]
