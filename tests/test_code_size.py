"""Files, functions and signatures stay small enough to take in at a glance."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import knnlm

SOURCE = Path(knnlm.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60  # besides its signature
MOST_POSITIONAL = 5


def size_problems(source: str) -> Iterator[str]:
    """Yield what is too large: the file, a function, or its list of positional parameters."""
    if len(source.splitlines()) > MOST_LINES_OF_A_FILE:
        yield f"{len(source.splitlines())} lines"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        lines = node.end_lineno - node.body[0].lineno + 1
        if lines > MOST_LINES_OF_A_FUNCTION:
            yield f"{node.name}: {lines} lines"
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        positional = len(names) - (names[:1] in (["self"], ["cls"]))
        if positional > MOST_POSITIONAL:
            yield f"{node.name}: {positional} positional parameters"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_too_large(path: Path) -> None:
    assert list(size_problems(path.read_text(encoding="utf-8"))) == []


def test_what_is_too_large_is_noticed() -> None:
    assert list(size_problems("def f(a, b, c, d, e, *, g): ...")) == []
    assert list(size_problems("class A:\n    def f(self, a, b, c, d, e): ...")) == []
    assert list(size_problems("def f(a, b, c, d, e, g): ...")) == ["f: 6 positional parameters"]
    assert list(size_problems("def f():\n" + "    x = 1\n" * 61)) == ["f: 61 lines"]
    assert list(size_problems("x = 1\n" * 401)) == ["401 lines"]
