"""The page of the Python interface says what the public names are now."""

import importlib.util
from pathlib import Path

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
