"""The text of a setting in `gvpo train --help`: the docstring below it, as one paragraph."""

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
    """Returns name -> docstring of a section's settings. Each is one line, so that help can wrap it at any width."""
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
    return setting_docs(section).get(name)  # read only when help is printed


def help_registry() -> Any:
    """Returns the tyro registry that reads sections with these docstrings. tyro alone would keep their line breaks."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        """Returns the settings of one section, with the values of the file as defaults."""
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
    """Prepares a text of the settings for help: no terminal control characters, and one character per column."""
    return "".join(char + _SECOND * (columns(char) - 1) for char in printable(text.replace(_SECOND, "\ufffd")))


class _Captured(io.StringIO):
    """Captures what is printed, in the form that it would have on the stream."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        """See TextIO.encoding. tyro chooses its frames by it."""
        return getattr(self._stream, "encoding", None)

    def isatty(self) -> bool:
        """See TextIO.isatty. tyro chooses its colors by it."""
        return Forgiving(self._stream).isatty()


@contextlib.contextmanager
def printing_help() -> Iterator[None]:
    """Prints the help that is printed inside `with`, and undoes the padding of `for_help`.

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
    """Pads a line of a frame that has characters without a column, so that it is as wide as the others."""
    missing, end = sum(columns(char) == 0 for char in line), line.rfind("│")
    return line if not missing or end < 0 else line[:end] + " " * missing + line[end:]
