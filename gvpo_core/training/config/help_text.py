"""What `gvpo train --help` says of a setting: the docstring below it, as one paragraph."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from gvpo_core.training.terminal.output import Forgiving, encodable, refusing_output
from gvpo_core.training.terminal.text import columns, printable

_SECOND = "\ue000"  # stands for the second column of a wide character: tyro counts characters


@functools.cache
def setting_docs(section: type) -> dict[str, str]:
    """The docstrings of a section's settings by name, each in one line, so that help can wrap it at any width."""
    docs: dict[str, str] = {}
    for cls in (c for c in reversed(section.__mro__) if dataclasses.is_dataclass(c)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(tree, ast.ClassDef)
        for setting, below in zip(tree.body, tree.body[1:], strict=False):
            match setting, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _doc(section: type, name: str) -> str | None:
    return setting_docs(section).get(name)  # read where help is printed alone


def help_registry() -> Any:
    """The tyro registry that reads sections with these docstrings; tyro itself keeps the breaks of their lines."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        """The settings of one section, with the values of the file as defaults."""
        if not (dataclasses.is_dataclass(info.type) and isinstance(info.default, info.type)):
            return None
        hints = get_type_hints(info.type)
        fields = (
            StructFieldSpec(
                f.name, hints[f.name], getattr(info.default, f.name), functools.partial(_doc, info.type, f.name)
            )
            for f in dataclasses.fields(info.type)
        )
        return StructConstructorSpec(info.type, tuple(fields))

    return registry


def for_help(text: str) -> str:
    """Text of the settings as help can lay it out: with nothing that commands a terminal, a character a column."""
    return "".join(char + _SECOND * (columns(char) - 1) for char in printable(text.replace(_SECOND, "\ufffd")))


class _Captured(io.StringIO):
    """What is printed, in the form that it would have on the stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        """See TextIO.encoding. It decides on the frames."""
        return getattr(self._stream, "encoding", None)

    def isatty(self) -> bool:
        """See TextIO.isatty. It decides on colors."""
        return Forgiving(self._stream).isatty()


@contextlib.contextmanager
def printing_help() -> Iterator[None]:
    """Prints what is printed inside `with`, with text of `for_help` as it was.

    Raises: OutputError: standard output cannot be written.
    """
    out = _Captured(sys.stdout)
    try:
        with contextlib.redirect_stdout(out):
            yield
    finally:
        lines = [_framed(line) for line in out.getvalue().replace(_SECOND, "").split("\n")]
        with refusing_output():
            print(encodable("\n".join(lines), sys.stdout), end="", flush=True)


def _framed(line: str) -> str:
    """The line of a frame, as wide as the others although it has characters without a column."""
    missing, end = sum(columns(char) == 0 for char in line), line.rfind("│")
    return line if not missing or end < 0 else line[:end] + " " * missing + line[end:]
