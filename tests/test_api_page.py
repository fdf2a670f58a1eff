"""The page of the Python interface says what the public names are now."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import griffe
import pytest

import knnlm

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_generator_makes() -> None:
    spec = importlib.util.spec_from_file_location("generate_api", DOCS / "generate_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render() == PAGE, "docs/api.md is out of date: make docs"


@pytest.mark.parametrize("name", knnlm.__all__)
def test_every_public_name_is_on_the_page(name: str) -> None:
    assert f"- [`{name}`](#{name.lower()}): " in PAGE, "in the contents"
    section = PAGE.split(f"\n### `{name}`\n")[1]
    documentation = getattr(knnlm, name).__doc__
    assert documentation.partition("\n")[0] in section.partition("\n### ")[0]


# reached through attributes that serve those who extend the package
INTERNAL = {
    "BucketedLambda",
    "Catalog",
    "ChatTemplate",
    "DraftedDecoding",
    "Encoder",
    "Explainable",
    "ForEach",
    "KeyedModel",
    "LearnedGate",
    "Message",
    "Mixer",
    "SavingRule",
    "SearchGate",
    "Stores",
    "TokenTexts",
    "Voters",
    "Votes",
}


def named_types(documented: griffe.Object) -> Iterator[str]:
    """Yield the knnlm types in the signatures and annotations of an object and its members."""
    parts: list[griffe.Object | griffe.Alias] = [documented]
    if documented.is_class:
        parts += [m for n, m in documented.members.items() if n == "__init__" or n[0] != "_"]
    for part in parts:
        annotations = [part.annotation] if isinstance(part, griffe.Attribute) else []
        if isinstance(part, griffe.Function):
            annotations = [part.returns, *(p.annotation for p in part.parameters)]
        for annotation in annotations:
            if isinstance(annotation, griffe.Expr):
                for name in annotation.iterate(flat=True):
                    if isinstance(name, griffe.ExprName) and name.canonical_path[:6] == "knnlm.":
                        yield name.name


def test_every_type_that_a_user_meets_is_public() -> None:
    loader = griffe.GriffeLoader(search_paths=[DOCS.parent / "src"])
    package = loader.load("knnlm")
    loader.resolve_aliases(implicit=True, external=False)
    met = {t for name in knnlm.__all__ for t in named_types(package[name].final_target)}
    assert met >= {"Parameters", *INTERNAL}
    assert met - set(knnlm.__all__) - INTERNAL == set()
