"""Web pages, PDFs, notebooks and archives as texts: what is read of them, and what is refused."""

import gzip
import io
import json
import logging
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import refusal
from made_files import ENCRYPTED, archive, pdf

from knnlm.errors import InvalidTextError, MissingDependencyError
from knnlm.text import archives
from knnlm.text.documents import Documents, Source
from knnlm.text.sources import read_documents

PAGE = """<!DOCTYPE html><html><head><title>Not shown</title><style>p {}</style></head><body>
<h1>A <em>memory</em></h1><p>One &lt; two,<br>and\n   <b>three</b>.</p><script>no()</script>
<ul><li>first<li>second</ul><pre>if x:\n    y</pre></body></html>"""
PAGE_TEXT = "A memory\n\nOne < two,\nand three.\n\n  * first\n  * second\nif x:\n    y\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(documents: Documents) -> dict[str, str]:
    """Return the texts by name, which are the same whenever they are read."""
    first, second = (
        {document.name: "".join(document.blocks()) for document in documents} for _ in range(2)
    )
    assert first == second
    assert documents.total_bytes == sum(len(text.encode()) for text in first.values())
    return first


# ------------------------------------------------------------------------------------- web pages


def test_a_page_is_what_it_shows() -> None:
    pytest.importorskip("inscriptis")
    write("a.html", PAGE)
    write("b.htm.gz", gzip.compress(PAGE.encode()))
    write("c.txt", PAGE)
    found = texts(read_documents("."))
    assert found == {"a.html": PAGE_TEXT, "b.htm.gz": PAGE_TEXT, "c.txt": PAGE}
    assert texts(read_documents("a.html", text_format="text")) == {"a.html": PAGE}
    assert texts(read_documents("c.txt", text_format="html")) == {"c.txt": PAGE_TEXT}


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("<p>é".encode(), "utf-8"),
        ("\ufeff<p>é".encode("utf-16"), "utf-8"),
        ("<meta charset='latin-1'><p>é".encode("latin-1"), "utf-8"),
        (
            '<meta http-equiv="Content-Type" content="text/html; charset=koi8-r"><p>й'.encode(
                "koi8-r"
            ),
            "cp1252",
        ),
        ("<?xml version='1.0' encoding='UTF-8'?><p>é".encode(), "utf-8"),
        ("<p>é".encode("cp1252"), "cp1252"),
    ],
)
def test_a_page_says_its_encoding_or_has_the_one_asked_for(data: bytes, encoding: str) -> None:
    pytest.importorskip("inscriptis")
    (text,) = texts(read_documents(write("a.html", data), encoding=encoding)).values()
    assert text in ("é\n", "й\n")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<p>caf\xe9", "'utf-8' codec can't decode byte 0xe9"),
        (b"<meta charset=klingon><p>x", "it says that its encoding is klingon"),
        (b"<script>x()</script>", "hold text, but has none"),
        (b"", "is empty"),
    ],
)
def test_pages_that_cannot_be_read_are_refused_by_name(data: bytes, reason: str) -> None:
    pytest.importorskip("inscriptis")
    with refusal(InvalidTextError, "text file a.html must", reason):
        read_documents(write("a.html", data))


# ------------------------------------------------------------------------------------------ PDFs


def test_a_pdf_is_the_text_of_its_pages() -> None:
    pytest.importorskip("pypdfium2")
    write("docs/a.pdf", pdf("One line\nand another.", "The second page"))
    found = texts(read_documents("docs"))
    assert found == {"docs/a.pdf": "One line\nand another.\n\nThe second page\n"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (ENCRYPTED, "it is encrypted and needs a password"),
        (b"%PDF-1.4 nonsense", "Data format error"),
        (b"no PDF", "Data format error"),
        (pdf(""), "hold text, but has none: a PDF of scanned pages needs OCR"),
    ],
)
def test_pdfs_without_readable_text_are_refused_by_name(data: bytes, reason: str) -> None:
    pytest.importorskip("pypdfium2")
    write("a.txt", "a")
    with refusal(InvalidTextError, "text file a.pdf must", reason):
        read_documents("a.txt", write("a.pdf", data))
    documents = read_documents("a.txt", "a.pdf", skip_bad=True)
    assert list(texts(documents)) == ["a.txt"]
    assert reason in documents.skipped[0]


def test_scanned_pdfs_in_folders_are_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("pypdfium2")
    write("docs/a.txt", "a")
    write("docs/scan.pdf", pdf("", ""))
    with caplog.at_level(logging.WARNING):
        assert texts(read_documents("docs")) == {"docs/a.txt": "a"}
    assert caplog.messages == ["left out 1 files that have no text, first: docs/scan.pdf"]


# ------------------------------------------------------------------------------------- notebooks


def cells(**notebook: object) -> str:
    return json.dumps({"nbformat": 4, "metadata": {}} | notebook)


def test_a_notebook_is_its_markdown_and_code_without_outputs() -> None:
    output = {"output_type": "stream", "name": "stdout", "text": ["out\n"]}
    listed = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text"]},
        {"cell_type": "code", "source": "x = 1\nprint(x)\n", "outputs": [output]},
        {"cell_type": "raw", "source": "raw"},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    text = "# Title\nText\n\nx = 1\nprint(x)\n"
    assert texts(read_documents(write("a.ipynb", cells(cells=listed)))) == {"a.ipynb": text}
    old = [{"cells": [{"cell_type": "code", "input": ["y = 2"], "outputs": [output]}]}]
    assert texts(read_documents(write("b.ipynb", cells(worksheets=old)))) == {"b.ipynb": "y = 2\n"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"cells": [{"source": "x"}]}', "KeyError: 'cell_type'"),
        ('{"cells": [{"cell_type": "code", "source": "\\ud800"}]}', "surrogates not allowed"),
        ('{"cells": []}', "hold text, but has none"),
    ],
)
def test_what_is_no_notebook_is_refused_by_name(source: str, reason: str) -> None:
    with refusal(InvalidTextError, "text file a.ipynb must", reason):
        read_documents(write("a.ipynb", source))


def test_a_pipe_may_hold_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    identities = []
    for source in ("one", "two", "one"):
        data = cells(cells=[{"cell_type": "code", "source": source}]).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        documents = read_documents("-", text_format="notebook")
        assert texts(documents) == {"-": f"{source}\n"}
        identities += [document.identity for document in documents]
    assert identities[0] == identities[2] != identities[1]


def test_conversations_are_in_none_of_them() -> None:
    with refusal(InvalidTextError, "a.ipynb must have rows with conversations"):
        read_documents(write("a.ipynb", cells(cells=[])), chat=True)


@pytest.mark.parametrize(("name", "package"), [("a.html", "inscriptis"), ("a.pdf", "pypdfium2")])
def test_the_extra_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with refusal(MissingDependencyError, package, "pip install 'knnlm[files]'"):
        read_documents(write(name, "x"))


# -------------------------------------------------------------------------------------- archives


def test_members_are_read_as_files_are(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    notebook = cells(cells=[{"cell_type": "code", "source": "x"}])
    members: list[tuple[str, str | bytes]] = [
        ("docs/a.txt", "a\n"),
        ("docs/b.txt.gz", gzip.compress(b"b")),
        ("docs/empty.txt", ""),
        ("image.png", b"\x89PNG\r\n"),
        ("inner.zip", archive([("x.txt", "x")])),
        ("n.ipynb", notebook),
        ("rows.csv", "text\none\ntwo\n"),
        (".hidden/c.txt", "no"),
        ("__MACOSX/a.txt", "no"),
    ]
    write("docs/all.zip", archive(members))
    with caplog.at_level(logging.WARNING):
        documents = read_documents("docs")
    found = texts(documents)
    where = "docs/all.zip"
    assert found == {
        f"{where}/docs/a.txt": "a\n",
        f"{where}/docs/b.txt.gz": "b",
        f"{where}/n.ipynb": "x\n",
        f"{where}/rows.csv:2": "one",
        f"{where}/rows.csv:3": "two",
    }
    assert caplog.messages == ["skipped 2 binary files among the text sources"]
    identities = [document.identity for document in documents]
    assert identities[0] == f"{folder}/{where}/docs/a.txt"
    assert str(identities[-1]).startswith(f"{folder}/{where}/rows.csv#")
    assert documents.sources == (
        Source(f"{folder}/docs", rows=False),
        Source(f"{folder}/{where}", rows=False),
        Source(f"{folder}/{where}/rows.csv", rows=True),
    )
    assert texts(read_documents("docs/*.zip")) == found


def test_parquet_in_an_archive() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), "r.parquet")
    write("a.zip", archive([("r.parquet", Path("r.parquet").read_bytes())]))
    found = texts(read_documents("a.zip"))
    assert found == {"a.zip/r.parquet:0": "one", "a.zip/r.parquet:1": "two"}


def test_undecodable_members_are_refused_by_name_or_skipped(folder: Path) -> None:
    write("a.zip", archive([("a.txt", "a"), ("latin.txt", b"caf\xe9")]))
    with refusal(InvalidTextError, "text file a.zip/latin.txt must be UTF-8", "byte 3"):
        read_documents("a.zip")
    documents = read_documents("a.zip", skip_bad=True)
    assert texts(documents) == {"a.zip/a.txt": "a"}
    assert documents.sources == (), "nobody may forget what was in an archive with bad members"
    assert len(documents.skipped) == 1


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "a\\b.txt"])
def test_members_whose_paths_lead_out_are_refused(name: str) -> None:
    data = archive([("good.txt", "good"), (name.replace("\\", "|"), "evil")])
    write("a.zip", data.replace(b"a|b.txt", b"a\\b.txt"))
    with refusal(InvalidTextError, "a.zip: member", "must have a path within the archive"):
        read_documents("a.zip")
    assert texts(read_documents("a.zip", skip_bad=True)) == {"a.zip/good.txt": "good"}


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_FREE_BYTES", 1 << 10)
    write("a.zip", archive([(f"{n}.txt", " " * 50_000) for n in range(4)]))

    def never(*arguments: object) -> None:
        raise AssertionError("unpacked")

    monkeypatch.setattr(archives.Archive, "open", never)
    with refusal(InvalidTextError, "a.zip must unpack to at most", "but would to 200000"):
        read_documents("a.zip")


def test_a_member_is_never_larger_than_it_claims() -> None:
    data = archive([("a.txt", "x" * 1000)])
    size = (1000).to_bytes(4, "little")
    write("a.zip", data.replace(size, (10).to_bytes(4, "little")))
    with refusal(InvalidTextError, "text file a.zip/a.txt cannot be read", "CRC"):
        read_documents("a.zip")


def test_archives_that_cannot_be_read_are_refused_by_name() -> None:
    write("a.txt", "a")
    whole = archive([("a.txt", "hello " * 100)])
    broken = bytearray(whole)
    broken[45] ^= 0xFF  # in the compressed text
    locked = bytearray(whole)
    for start in (whole.index(b"PK\x03\x04") + 6, whole.index(b"PK\x01\x02") + 8):
        locked[start] |= 1
    for data, reason in [
        (whole[:40], "File is not a zip file"),
        (bytes(broken), "text file a.zip/a.txt cannot be read"),
        (bytes(locked), "must be readable without a password"),
        (b"text", "File is not a zip file"),
    ]:
        with refusal(InvalidTextError, reason):
            read_documents("a.txt", write("a.zip", data))
        documents = read_documents("a.txt", "a.zip", skip_bad=True)
        assert list(texts(documents)) == ["a.txt"]
        assert "a.zip" in documents.skipped[0]


def test_an_archive_of_many_members_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.zip", archive([(f"{n}.txt", f"text {n}") for n in range(200)]))
    opened = []
    original = zipfile.ZipFile.__init__

    def counted(self: zipfile.ZipFile, path: Path) -> None:
        opened.append(path)
        original(self, path)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", counted)
    assert len(texts(read_documents("a.zip"))) == 200
    assert len(opened) == 1
