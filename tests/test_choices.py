"""Named choices: one list of each, with one refusal."""

import ast
from enum import StrEnum
from pathlib import Path

import pytest

import knnlm
from knnlm import choices
from knnlm.choices import Boundary, parse_choice
from knnlm.errors import InvalidArgumentError

ENUMS = [
    each
    for each in vars(choices).values()
    if isinstance(each, type) and issubclass(each, StrEnum) and each is not StrEnum
]
SOURCE = Path(knnlm.__file__).parent


def lists_of_strings(source: str) -> list[set[str]]:
    """Return the strings of every list, tuple, set, dictionary and class body of a source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            parts: list[ast.expr | None] = list(node.elts)
        elif isinstance(node, ast.Dict):
            parts = list(node.keys)
        elif isinstance(node, ast.ClassDef):
            parts = [line.value for line in node.body if isinstance(line, ast.Assign)]
        else:
            continue
        found.append({str(p.value) for p in parts if isinstance(p, ast.Constant)})
    return found


def repeated(source: str) -> list[str]:
    """Return the choices whose values a source lists again."""
    named = {each.__name__: {value.value for value in each} for each in ENUMS}
    return [
        name
        for name, values in named.items()
        if any(values <= listed for listed in lists_of_strings(source))
    ]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_list_of_choices_is_written_twice(path: Path) -> None:
    if path != SOURCE / "choices.py":
        assert repeated(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('KINDS = ("document", "stream")', ["Boundary"]),
        ('class B(StrEnum):\n    document = "document"\n    stream = "stream"', ["Boundary"]),
        ('d = {"float16": 1, "bfloat16": 2, "float32": 3}', ["KeyDtype"]),
        ('if kind in {"learned", "distance", "fixed"}:\n    pass', ["Weights"]),
        ('names = ["document", "window"]', []),
    ],
)
def test_a_second_list_is_noticed(source: str, names: list[str]) -> None:
    assert repeated(source) == names


@pytest.mark.parametrize("each", ENUMS)
def test_choices_are_strings_with_the_values_of_their_names(each: type[StrEnum]) -> None:
    assert each.__doc__
    for choice in each:  # names cannot have hyphens
        assert choice.value in (choice.name, choice.name.replace("_", "-"))
    for choice in each:
        assert parse_choice(each, "argument", choice.value) is choice
        assert parse_choice(each, "argument", choice) is choice


def test_a_refusal_names_the_argument_its_choices_and_the_value() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_choice(Boundary, "boundary", "page")
    assert str(refused.value) == "boundary must be one of document, stream, got 'page'"
