"""The fast run has every test file at least once: none has slow tests alone."""

import ast
from collections.abc import Iterator

import pytest
from places import ROOT

pytestmark = pytest.mark.core


def slow_alone(source: str) -> bool:
    """Whether a test file has no test that is free of the mark `slow`, on itself, its class or the file."""
    tree = ast.parse(source)
    marks = [node.value for node in tree.body if isinstance(node, ast.Assign) and _assigns(node, "pytestmark")]
    return any(map(_slow, marks)) or not any(_fast(tree.body))


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _fast(body: list[ast.stmt]) -> Iterator[bool]:
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield any(_fast(node.body)) and not any(map(_slow, node.decorator_list))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield not any(map(_slow, node.decorator_list))


def _slow(mark: ast.expr) -> bool:
    """`pytest.mark.slow`, alone or in a list; not the marks of single parameters."""
    if isinstance(mark, ast.List | ast.Tuple):
        return any(map(_slow, mark.elts))
    return isinstance(mark, ast.Attribute) and mark.attr == "slow"


def test_every_test_file_has_a_test_of_the_fast_run():
    files = sorted((ROOT / "conformance").rglob("test_*.py"))
    assert len(files) > 150
    assert [str(file.relative_to(ROOT)) for file in files if slow_alone(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def test_a(): ...", False),
        ("@pytest.mark.slow\ndef test_a(): ...", True),
        ("@pytest.mark.slow\ndef test_a(): ...\ndef test_b(): ...", False),
        ("pytestmark = [pytest.mark.core, pytest.mark.slow]\ndef test_a(): ...", True),
        ("pytestmark = pytest.mark.core\ndef test_a(): ...", False),
        ("@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.slow), 2])\ndef test_a(x): ...", False),
        ("class TestA:\n    @pytest.mark.slow\n    def test_a(self): ...", True),
        ("def helper(): ...", True),
    ],
)
def test_a_file_of_slow_tests_alone_is_seen(source, expected):
    assert slow_alone(source) is expected
