"""Imports between files: no circle in the core, a backend or an adapter, and rooms of the trainer import downwards."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.core

# Rooms and files of gvpo_core/training, lowest first: each imports only from those before it.
# Of a run: its settings, the model, rewards, groups, what is shown of it, its record, the loop, the commands.
TRAINING = [
    "intervals", "terminal", "files", "sampling", "config", "policy", "rewards", "rows", "fingerprint",
    "data", "objective", "samplers", "episodes", "rollout", "dealing", "improve", "recorded", "teacher", "sources",
    "inputs", "watch", "metrics", "evaluation", "report", "run", "loop", "cli",
]  # fmt: skip
FACES = {"__init__", "builtin_rewards", "console"}  # names for users: they re-export, and nothing imports them
PACKAGES = {path.name: path for folder in (".", "backends", "adapters") for path in (ROOT / folder).glob("gvpo*/")}


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that a file imports, in functions too; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imported(node)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of its package that it imports.

    `from package import module` is an import of the module; `from package import name` of the package's __init__.
    """
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for target in imported(ast.parse(path.read_text(encoding="utf-8"))):
            while target and target not in files:
                target = target.rpartition(".")[0]
            if target and target != name:
                graph[name].add(target)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or nothing."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph[name]):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_an_import_in_a_function_counts_and_one_for_types_does_not() -> None:
    code = "from a import b\ndef f():\n    import c.d\nif TYPE_CHECKING:\n    import e\nelse:\n    import g"
    assert {*imported(ast.parse(code))} >= {"a.b", "c.d"}
    assert "e" not in {*imported(ast.parse(code))}


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_imports_make_no_circle(name: str) -> None:
    graph = import_graph(PACKAGES[name])
    assert graph
    assert circle(graph) == []


def room(module: str) -> str:
    """The folder or file of gvpo_core/training that a module is in."""
    return [*module.split("."), "__init__"][2]


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room of the trainer from a later one, or from a face, as "module -> module"."""
    level = {name: i for i, name in enumerate(TRAINING)}
    return [
        f"{name} -> {target}"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if target.startswith("gvpo_core.training") and room(name) not in FACES and room(name) != room(target)
        if room(target) in FACES or level[room(target)] > level[room(name)]
    ]


def test_an_upward_import_is_found() -> None:
    graph = {
        "gvpo_core.training.config.check": {"gvpo_core.training.watch.text", "gvpo_core.training.config"},
        "gvpo_core.training.watch.console": {"gvpo_core.training.config.check", "gvpo_core.objective"},
        "gvpo_core.training.loop": {"gvpo_core.training"},
        "gvpo_core.training": {"gvpo_core.training.loop"},
    }
    assert upward_imports(graph) == [
        "gvpo_core.training.config.check -> gvpo_core.training.watch.text",
        "gvpo_core.training.loop -> gvpo_core.training",
    ]


def test_rooms_of_the_trainer_import_downwards() -> None:
    graph = {name: of for name, of in import_graph(PACKAGES["gvpo_core"]).items() if name.startswith("gvpo_core.train")}
    assert {room(name) for name in graph} == {*TRAINING, *FACES}
    assert upward_imports(graph) == []
