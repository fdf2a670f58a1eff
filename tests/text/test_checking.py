"""What is checked before anything is read: skipped files and rows, pipes, sources, identities."""

import io
import os
import sys
import threading
from pathlib import Path

import pytest
from conftest import refusal

from knnlm.errors import InvalidTextError, TextNotFoundError
from knnlm.text.documents import Source
from knnlm.text.sources import read_documents


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("a")
    Path("docs/rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    return tmp_path


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_what_is_bad_is_skipped_and_named(folder: Path) -> None:
    Path("docs/latin.txt").write_bytes(b"caf\xe9")
    Path("docs/more.jsonl").write_text('{"text": "x"}\nnonsense\n{"text": 3}\n{"text": "y"}\n')
    Path("docs/none.csv").write_text("a,b\n1,2\n")
    Path("docs/z.txt").write_text("z")
    (folder / "docs" / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    documents = read_documents("docs", "docs/z.txt", skip_bad=True)
    named = ["docs/a.txt", "docs/more.jsonl:1", "docs/more.jsonl:4"]
    named += ["docs/rows.jsonl:1", "docs/rows.jsonl:3", "docs/z.txt"]
    for _ in range(2):
        assert [document.name for document in documents] == named
        lines = sorted(documents.skipped)
        assert len(lines) == 5
        for line, part in zip(
            lines,
            [
                "docs/more.jsonl:2: the row cannot be read",
                "docs/more.jsonl:3: text_column 'text' must hold strings",
                "docs/none.csv:1: text_column 'text' must be one of",
                r"text file 'docs/caf\udce9.txt' must have a name",
                "text file docs/latin.txt must be UTF-8",
            ],
            strict=True,
        ):
            assert line.startswith(part)
    # what is incomplete must not make anyone forget what was in it
    rows = Source(str(folder / "docs" / "rows.jsonl"), rows=True)
    assert set(documents.sources) == {rows, Source(str(folder / "docs" / "z.txt"), rows=False)}


def test_when_nothing_is_left_the_reason_is_named() -> None:
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("ids.jsonl").write_text('{"text": "x", "id": null}\n')
    with refusal(InvalidTextError, "hold none", "2 that cannot be read", "latin.txt must be UTF-8"):
        read_documents("latin.txt", "ids.jsonl", id_column="id", skip_bad=True)


def test_sources_and_identities(folder: Path) -> None:
    Path("link.txt").symlink_to("docs/a.txt")
    Path("docs/emptied.jsonl").write_text("")
    here = str(folder)
    rows = [Source(f"{here}/docs/{name}.jsonl", rows=True) for name in ("emptied", "rows")]
    for spelling in ("docs", "./docs", "docs/../docs/", here + "/docs"):
        documents = read_documents(spelling)
        assert list(documents.sources) == [Source(f"{here}/docs", rows=False), *rows]
        identities = [str(document.identity) for document in documents]
        assert identities[0] == f"{here}/docs/a.txt"
        assert all(each.startswith(f"{here}/docs/rows.jsonl#") for each in identities[1:])
    (document,) = read_documents("link.txt", "docs/a.txt")
    assert (document.name, document.identity) == ("link.txt", f"{here}/docs/a.txt")
    assert list(read_documents("docs/*").sources) == rows
    assert list(read_documents("docs/a.txt").sources) == [Source(f"{here}/docs/a.txt", rows=False)]


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_the_standard_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"some text\n")
    documents = read_documents(name, "docs/a.txt")
    for _ in range(2):
        one, two = documents
        assert ("".join(one.blocks()), one.name) == ("some text\n", name)
        assert two.name == "docs/a.txt"
    assert documents.sources[0].identity.endswith("docs/a.txt")
    give_stdin(monkeypatch, b"other text")
    (other,) = read_documents(name)
    assert str(other.identity).startswith("-#")
    assert other.identity != one.identity
    give_stdin(monkeypatch, b'{"text": "row"}\n')
    (row,) = read_documents(name, text_format="jsonl")
    assert (row.text, row.name) == ("row", f"{name}:1")


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "is empty"), (b"\0\1", "is binary"), (b"\xff", "must be UTF-8")]
)
def test_a_bad_standard_input_is_refused(
    data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_stdin(monkeypatch, data)
    with refusal(InvalidTextError, "text file -", reason):
        read_documents("-")
    monkeypatch.setattr(sys, "stdin", None)
    with refusal(InvalidTextError, "'-'", "it is closed"):
        read_documents("-")


def test_pipes() -> None:
    os.mkfifo("rows.jsonl")

    def write() -> None:
        Path("rows.jsonl").write_text('{"text": "one"}\n' + "\n" * 200_000 + '{"text": "two"}')

    thread = threading.Thread(target=write)
    thread.start()
    documents = read_documents("rows.jsonl")
    thread.join()
    for _ in range(2):
        assert [document.text for document in documents] == ["one", "two"]
    with refusal(TextNotFoundError, "'rows.jsonl'", "nothing is written to the pipe", "check"):
        read_documents("rows.jsonl")
    read_end, write_end = os.pipe()
    os.write(write_end, b"through a descriptor")
    os.close(write_end)
    (document,) = read_documents(f"/dev/fd/{read_end}")
    os.close(read_end)
    assert "".join(document.blocks()) == "through a descriptor"


def test_a_folder_below_that_cannot_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("docs/locked").mkdir()
    listdir = os.listdir

    def refuse(path: object = ".") -> list[str]:
        if Path(str(path)).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    documents = read_documents("docs", skip_bad=True)
    assert list(documents.skipped) == ["folder docs/locked cannot be listed (Permission denied)"]
    assert Source(str(Path("docs").resolve()), rows=False) not in documents.sources
