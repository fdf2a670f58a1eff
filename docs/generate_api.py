"""Write docs/api.md from the docstrings of the public names: python docs/generate_api.py."""

import re
from pathlib import Path

import griffe
import griffe2md

import knnlm

PAGE = Path(__file__).with_name("api.md")
SOURCE = Path(__file__).parents[1] / "src"
_HEAD = """\
# The Python interface

<!-- Written by docs/generate_api.py (make docs); a test fails when it is out of date. -->

Every name here is imported from `knnlm`. Importing the package loads nothing heavy: torch and
transformers are loaded when a name that needs them is first used. The words are those of the
[glossary](glossary.md).
"""
_CONFIG = griffe2md.ConfigDict(
    docstring_style=None,
    filters=["!^_"],
    heading_level=3,
    inherited_members=True,
    line_length=100,
    members_order="source",
    show_bases=True,
    show_if_no_docstring=False,
    show_object_full_path=False,
    show_root_full_path=False,
    show_root_members_full_path=False,
    show_signature_annotations=True,
    summary=False,
)
_ARGUMENT = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


def render() -> str:
    """Return the page: functions, classes, choices and errors, each with its docstring."""
    loader = griffe.GriffeLoader(search_paths=[SOURCE])
    package = loader.load("knnlm")
    loader.resolve_aliases(implicit=True, external=False)
    sections: dict[str, list[griffe.Object]] = {"Functions": [], "Classes": [], "Choices": []}
    sections["Errors"] = []
    for name in knnlm.__all__:
        sections[_section(getattr(knnlm, name))].append(package[name].final_target)
    contents, pages = [_HEAD], []
    for title, objects in sections.items():
        lines = [f"[`{o.name}`](#{o.name.lower()}): {_summary(o)}" for o in objects]
        contents.append(f"**{title}**\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
        pages += [f"## {title}\n", *map(_render, objects)]
    return "\n".join([*contents, *pages]).rstrip() + "\n"


def _section(public: object) -> str:
    if not isinstance(public, type):
        return "Functions"
    if public.__module__ == "knnlm.choices":
        return "Choices"
    return "Errors" if issubclass(public, knnlm.KNNLMError) else "Classes"


def _summary(documented: griffe.Object) -> str:
    assert documented.docstring is not None
    return " ".join(documented.docstring.value.partition("\n\n")[0].split())


def _render(documented: griffe.Object) -> str:
    for part in (documented, *documented.members.values()):
        if part.docstring is not None:
            part.docstring.value = _as_lists(part.docstring.value)
    return griffe2md.render_object_docs(documented, _CONFIG).strip() + "\n"


def _as_lists(docstring: str) -> str:
    """Make a list of the lines that begin with the name of an argument or a field."""
    return _ARGUMENT.sub(lambda match: f"- **{match[1]}**: ", docstring)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
