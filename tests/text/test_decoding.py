"""Encodings, compression, and files that are no text."""

import gzip
import random
import zlib
from pathlib import Path

import pytest
from conftest import PROSE, refusal

from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.text import decoding
from knnlm.text.documents import Document
from knnlm.text.sources import read_documents

TEXTS = {
    "cp1252": "Grüße – “déjà vu”\r\n",
    "shift_jis": "これは日本語です。\n",
    "gb18030": "这是中文。\n",
    "koi8-r": "Это по-русски.\n",
    "utf-16": "a\nb é中🙂\u0a0a\n",
    "utf-16-le": "plain text, \u0a0a\n",
    "utf-32": "a\nb 🙂\n",
    "utf-7": "a + é\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("piece_bytes", [1, 3, 1 << 20])
def test_encodings(encoding: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PIECE_BYTES", piece_bytes)
    text = TEXTS[encoding] * 3
    Path("a.txt").write_bytes(text.encode(encoding))
    Path("a.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    lines = f'{{"text": "{text.strip()!s}"}}'.replace("\r", "\\r").replace("\n", "\\n")
    Path("a.jsonl").write_bytes(f"{lines}\n\n{lines}".encode(encoding))
    Path("a.csv").write_bytes(f'text\n"{text}"\n'.encode(encoding))
    documents = read_documents("a.txt", "a.txt.gz", "a.jsonl", "a.csv", encoding=encoding)
    read = ["".join(document.blocks()) for document in documents]
    assert read == [text, text, text.strip(), text.strip(), text]
    sizes = [len(each.encode()) for each in read]
    assert [document.size_bytes for document in documents] == sizes
    assert documents.total_bytes == sum(sizes)


@pytest.mark.parametrize("last", ["", "é"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_other_kinds_of_unicode_are_named_in_the_refusal(encoding: str, last: str) -> None:
    Path("docs").mkdir()
    Path("docs/a.txt").write_bytes(f"{PROSE}{last}".encode(encoding))
    with refusal(InvalidTextError, "docs/a.txt must be UTF-8", f"--encoding {encoding}"):
        read_documents("docs")
    (document,) = read_documents("docs", encoding=encoding)
    assert "".join(document.blocks()) == f"{PROSE}{last}"


@pytest.mark.parametrize("name", ["nonsense", "", "base64", "rot13", "a\0b", "\ud800", "x" * 5000])
def test_what_is_no_encoding_is_refused(name: str) -> None:
    Path("a.txt").write_text("a")
    with refusal(InvalidArgumentError, "encoding must be the name of a text encoding", "try"):
        read_documents("a.txt", encoding=name)


def test_text_that_the_encoding_cannot_hold_is_refused() -> None:
    Path("a.txt").write_bytes("é".encode())
    with refusal(InvalidTextError, "a.txt must be ascii, but byte 0", "name its encoding"):
        read_documents("a.txt", encoding="ascii")
    Path("a.txt").write_bytes(b"+2AA-")  # half a character in UTF-7
    with refusal(InvalidTextError, "a.txt must be utf-7"):
        read_documents("a.txt", encoding="utf-7")


BINARIES = {
    "a PDF": b"%PDF-1.4\n1 0 obj << /Length 5 >> stream\nabc\nendstream\n",
    "compressed by gzip": gzip.compress(random.Random(0).randbytes(50)),
    "compressed by bzip2": b"BZh91AY&SY\x01\x02",
    "a zip archive": b"PK\x03\x04\x14",
    "a PNG image": b"\x89PNG\r\n\x1a\n",
    "binary": zlib.compress(random.Random(1).randbytes(4000).replace(b"\0", b"")),
}


@pytest.mark.parametrize("kind", BINARIES)
def test_binary_kinds_that_begin_like_text_are_binary(kind: str) -> None:
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("a")
    Path("docs/b").write_bytes(BINARIES[kind])
    assert [document.name for document in read_documents("docs")] == ["docs/a.txt"]
    with refusal(InvalidTextError, "docs/b must hold UTF-8 text, but is", kind, "convert"):
        read_documents("docs/b")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["truncated", "garbage"])
def test_damaged_compression_is_refused(suffix: str, kind: str) -> None:
    import pyarrow

    data = random.Random(0).randbytes(5000).hex().encode()
    packed = gzip.compress(data)
    if suffix == ".zst":
        packed = pyarrow.compress(data, codec="zstd", asbytes=True)
    packed = packed[:-100] if kind == "truncated" else b"text, not compressed"
    Path(f"a.txt{suffix}").write_bytes(packed)
    with refusal(InvalidTextError, f"a.txt{suffix} cannot be read", "leave it out"):
        read_documents(f"a.txt{suffix}")


@pytest.mark.parametrize("part", ["name", "text", "identity"])
def test_documents_hold_what_utf8_holds(part: str) -> None:
    parts = {"name": "a", "text": "b", "identity": "c", part: "caf\udce9"}
    with refusal(InvalidTextError, part, "UTF-8 can hold", r"'\udce9'", "correct it"):
        Document(parts["name"], parts["text"], parts["identity"])


def test_the_metered_bytes_of_a_file_are_all_its_bytes() -> None:
    data = gzip.compress(b"text\n" * 10_000)
    Path("a.txt.gz").write_bytes(data)
    read: list[float] = []
    pieces = decoding.TextFile(Path("a.txt.gz")).pieces(
        lambda amount, total=None, note=None: read.append(amount)
    )
    assert "".join(pieces) == "text\n" * 10_000
    assert sum(read) == len(data)
