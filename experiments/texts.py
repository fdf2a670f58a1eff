"""The default texts of the experiments: three collections from Debian packages.

    sudo apt-get install python3.11-doc postgresql-doc-15 r-cran-janeaustenr r-base-core

Documents are shuffled with seed 0, and held-out text never comes from a document in the datastore:
other modules of Python's library reference, other pages of PostgreSQL's manual, other novels by
Jane Austen.
"""

import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PYTHON = Path("/usr/share/doc/python3.11/html/_sources/library")
POSTGRESQL = Path("/usr/share/doc/postgresql-doc-15/html")
NOVELS = """
library(janeaustenr)
novels <- austen_books()
for (book in levels(novels$book))
    writeLines(novels$text[novels$book == book], file.path(commandArgs(TRUE), book))
"""
_HELD_OUT_NOVELS = ("Northanger Abbey", "Persuasion")  # for validation, for test
_SHORTEST_PAGE = 2000  # characters


@dataclass(frozen=True, slots=True)
class Domain:
    """A collection: text for the datastore, for tuning, and for measuring.

    Each is a list of files, folders, globs or hf:NAME, as for `knnlm.read_documents`. entries: the
    maximum in the datastore; None for all.
    """

    name: str
    train: list[str]
    valid: list[str]
    test: list[str]
    entries: int | None = None


def python_reference(work: Path) -> Domain:
    """Return Python's library reference, split as in reference.py."""
    files = sorted(map(str, PYTHON.glob("*.rst.txt")))
    random.Random(0).shuffle(files)
    return Domain("Python", files[24:], files[:12], files[12:24], 519_168)


def postgresql_manual(work: Path) -> Domain:
    """Return PostgreSQL's manual without index, release notes and HTML tags."""
    folder = work / "postgresql"
    if not folder.exists():
        pages = sorted(POSTGRESQL.glob("*.html"))
        texts = {
            page.stem: _strip_tags(page.read_text(encoding="utf-8"))
            for page in pages
            if not page.stem.startswith(("release", "bookindex"))
        }
        _write(folder, {name: text for name, text in texts.items() if len(text) > _SHORTEST_PAGE})
    files = sorted(map(str, folder.glob("*.txt")))
    random.Random(0).shuffle(files)
    return Domain("PostgreSQL", files[48:], files[:24], files[24:48], 120_000)


def austen_novels(work: Path) -> Domain:
    """Return Jane Austen's novels, one document per chapter: four to store, two held out."""
    folder = work / "austen"
    if not folder.exists():
        novels = work / "novels"
        novels.mkdir(parents=True, exist_ok=True)
        subprocess.run(["Rscript", "-e", NOVELS, novels], check=True)
        chapters = {}
        for novel in sorted(novels.iterdir()):
            parts = re.split(r"^(?=CHAPTER |Chapter )", novel.read_text("utf-8"), flags=re.M)
            for number, text in enumerate(parts[1:], start=1):
                chapters[f"{novel.name} {number:02}"] = text
        _write(folder, chapters)
    files = sorted(map(str, folder.glob("*.txt")))
    valid, test = ([f for f in files if novel in f] for novel in _HELD_OUT_NOVELS)
    train = [file for file in files if file not in {*valid, *test}]
    random.Random(0).shuffle(train)
    return Domain("Austen", train, valid, test, 60_000)


DOMAINS: dict[str, Callable[[Path], Domain]] = {
    "Python": python_reference,
    "PostgreSQL": postgresql_manual,
    "Austen": austen_novels,
}


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write a folder of files atomically."""
    aside = folder.with_suffix(".aside")
    aside.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (aside / f"{name}.txt").write_text(text, encoding="utf-8")
    aside.rename(folder)


class _TextParser(HTMLParser):
    """Collects the text of a page, except its head and its navigation links."""

    _OUTSIDE = ("navheader", "navfooter")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._in_body = False
        self._divs: list[bool] = []  # for each open div: whether it is left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_body |= tag == "body"
        if tag == "div":
            self._divs.append(dict(attrs).get("class") in self._OUTSIDE)

    def handle_endtag(self, tag: str) -> None:
        if tag == "div" and self._divs:
            self._divs.pop()

    def handle_data(self, data: str) -> None:
        if self._in_body and not any(self._divs):
            self.parts.append(data)


def _strip_tags(html: str) -> str:
    parser = _TextParser()
    parser.feed(html)
    parser.close()
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip() + "\n"
