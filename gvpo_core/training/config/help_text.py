"""What `gvpo train --help` says of a setting: the docstring below it, as one paragraph."""

import ast
import dataclasses
import functools
import inspect
import textwrap
from typing import Any, get_type_hints


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
