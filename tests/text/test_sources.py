import hashlib
import itertools
import json
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from knnlm.errors import (
    InvalidArgumentError,
    InvalidTextError,
    MissingDependencyError,
    TextNotFoundError,
)
from knnlm.text import documents as documents_module, rows
from knnlm.text.documents import BLOCK_CHARACTERS, Document, Documents
from knnlm.text.sources import read_documents


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def write_jsonl(path: str, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: str, row_group_size: int | None = None, **columns: list[Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return Path(path)


def texts(documents: Iterable[Document]) -> dict[str, str]:
    listed = [(document.name, "".join(document.blocks())) for document in documents]
    assert len(dict(listed)) == len(listed), "names are not unique"
    return dict(listed)


# ---------------------------------------------------------------------------------------- blocks


def reference_blocks(text: str, limit: int) -> list[str]:
    blocks = []
    while text:
        cut = len(text)
        if cut > limit:
            cut = limit
            while cut and text[cut - 1] != "\n":
                cut -= 1
            cut = cut or limit
        blocks.append(text[:cut])
        text = text[cut:]
    return blocks


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 50])
def test_blocks_of_strings_and_files_match_the_reference(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "BLOCK_CHARACTERS", limit)
    generator = random.Random(limit)
    for _ in range(100):
        text = "".join(generator.choices("ab\n\r\u2028é中🙂", k=generator.randrange(60)))
        blocks = list(Document("string", text).blocks())
        assert blocks == reference_blocks(text, limit)
        path = write("file.txt", text)
        assert list(Document("file", path).blocks()) == blocks


def test_a_long_file_is_read_block_by_block() -> None:
    line = "0123456789abcde\n"
    long = (line * (5 * BLOCK_CHARACTERS // len(line))).encode()
    blocks = Document("long", write("long.txt", long + b"end" + b"\xff")).blocks()
    assert [next(blocks) for _ in range(4)] == [line * (BLOCK_CHARACTERS // len(line))] * 4
    with pytest.raises(InvalidTextError, match=f"byte {len(long) + 3} is not"):
        list(blocks)


def test_a_byte_order_mark_is_stripped_and_line_ends_survive() -> None:
    path = write("bom.txt", b"\xef\xbb\xbfa\r\nb\rc\n")
    assert "".join(Document("bom", path).blocks()) == "a\r\nb\rc\n"
    path = write("marks.txt", "\ufeff\ufeffa")
    assert "".join(Document("marks", path).blocks()) == "\ufeffa"


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("good", ["", "abc", "x" * (BLOCK_CHARACTERS + 1), "中" * BLOCK_CHARACTERS])
@pytest.mark.parametrize("bad", [b"\xff tail", b"\xe4\xb8"], ids=["byte", "cut character"])
def test_text_that_is_not_utf8_names_the_byte(prefix: bytes, good: str, bad: bytes) -> None:
    path = write("bad.txt", prefix + good.encode() + bad)
    offset = len(prefix) + len(good.encode())
    with refusal(InvalidTextError, "bad.txt must be UTF-8", f"byte {offset} is not", "convert"):
        list(Document("bad", path).blocks())


def test_fingerprint_and_size() -> None:
    text = "Grüße\r\n" * 300_000
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = write("a.txt", text)
    assert Document("string", text).fingerprint() == digest
    assert Document("file", path).fingerprint() == digest
    assert Document("bom", write("bom.txt", "\ufeff" + text)).fingerprint() == digest
    assert Document("other", text + "x").fingerprint() != digest
    assert Document("string", text).size_bytes == 300_000 * 9
    assert Document("file", path).size_bytes == 300_000 * 9


def test_a_file_that_vanished_is_refused() -> None:
    path = write("a.txt", "text")
    (document,) = read_documents("a.txt")
    path.unlink()
    with refusal(InvalidTextError, "a.txt cannot be read (No such file", "check"):
        list(document.blocks())


# ----------------------------------------------------------------------- files, folders and globs


def test_files_keep_their_order_and_their_names_as_typed(folder: Path) -> None:
    write("b.txt", "bee")
    write("sub/a.md", "ay")
    documents = read_documents("./b.txt", Path("sub/a.md"), str(folder / "sub" / ".." / "b.txt"))
    assert list(texts(documents).items()) == [("./b.txt", "bee"), ("sub/a.md", "ay")]
    assert documents.total_bytes == 5
    assert texts(documents) == texts(documents), "a second pass differs"


@pytest.mark.parametrize("source", ["docs", "docs/", "./docs"])
def test_a_folder_is_read_recursively_in_posix_order(source: str) -> None:
    names = ["b.txt", "a/z.py", "a-b/y.rst", "a/b/c.md", "Z.txt"]
    for name in names:
        write(f"docs/{name}", name)
    write("docs/.hidden.txt", "no")
    write("docs/.git/config", "no")
    write("docs/a/.cache/x.txt", "no")
    write("docs/empty.txt", "")
    write("docs/only-bom.txt", b"\xef\xbb\xbf")
    documents = read_documents(source)
    assert list(texts(documents).items()) == [(f"docs/{name}", name) for name in sorted(names)]
    assert documents.total_bytes == sum(map(len, names))


def test_the_current_folder_and_a_hidden_folder_can_be_named() -> None:
    write("a.txt", "ay")
    write(".notes/b.txt", "bee")
    assert texts(read_documents(".")) == {"a.txt": "ay"}
    assert texts(read_documents(".notes")) == {".notes/b.txt": "bee"}


def test_links_to_files_are_read_once_and_links_to_folders_not_followed() -> None:
    write("docs/a.txt", "ay")
    Path("docs/b.txt").symlink_to("a.txt")
    Path("docs/broken.txt").symlink_to("nowhere")
    Path("docs/loop").symlink_to(".")
    write("other/c.txt", "sea")
    Path("docs/other").symlink_to("../other")
    assert texts(read_documents("docs", "docs/b.txt")) == {"docs/a.txt": "ay"}


def test_globs() -> None:
    for name in ["d/b.txt", "d/a.txt", "d/e/c.txt", "d/e/.h.txt", "d/x.md"]:
        write(name, name)
    Path("d/folder.txt").mkdir()
    assert list(texts(read_documents("d/*.txt"))) == ["d/a.txt", "d/b.txt"]
    assert list(texts(read_documents("d/**/*.txt"))) == ["d/a.txt", "d/b.txt", "d/e/c.txt"]
    assert list(texts(read_documents("d/[ax].*"))) == ["d/a.txt", "d/x.md"]
    assert list(texts(read_documents("d/?.md", "d/x.md", "d"))) == [
        "d/x.md",
        "d/a.txt",
        "d/b.txt",
        "d/e/c.txt",
    ]


def test_a_name_with_glob_characters_is_a_file_where_it_exists() -> None:
    write("a[1].txt", "brackets")
    write("a1.txt", "one")
    assert texts(read_documents("a[1].txt")) == {"a[1].txt": "brackets"}


@pytest.mark.parametrize("source", ["docs", "docs/**"])
def test_binary_files_are_skipped_with_one_warning(
    source: str, caplog: pytest.LogCaptureFixture
) -> None:
    write("docs/a.txt", "ay")
    write("docs/b.png", b"\x89PNG\0\0")
    write("docs/c/d.pyc", b"x" * 8191 + b"\0")
    write("docs/late.txt", b"x" * 8192 + b"\0")
    with caplog.at_level(logging.WARNING):
        documents = read_documents(source, "docs/c")
    assert list(texts(documents)) == ["docs/a.txt", "docs/late.txt"]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped 2 binary files among the text sources"
    ]


def test_text_without_binaries_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    write("docs/a.txt", "ay")
    read_documents("docs")
    assert not caplog.records


def test_a_file_that_is_not_utf8_in_a_folder_is_refused_at_once() -> None:
    write("docs/a.txt", "ay")
    write("docs/b.txt", b"latin \xe9")
    with refusal(InvalidTextError, "docs/b.txt must be UTF-8", "byte 6", "convert", "--encoding"):
        read_documents("docs")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "is empty"),
        ("bom.txt", b"\xef\xbb\xbf", "is empty"),
        ("e.jsonl", b"", "is empty"),
        ("e.parquet", b"", "is empty"),
        ("b.png", b"\0", "is binary"),
    ],
)
def test_a_named_file_without_text_is_refused(name: str, content: bytes, reason: str) -> None:
    write(f"docs/{name}", content)
    write("docs/a.txt", "ay")
    with refusal(InvalidTextError, f"docs/{name}", reason, "leave it out"):
        read_documents("docs", f"docs/{name}")


@pytest.mark.parametrize(
    "source", ["nowhere.txt", "no/**/*.txt", "docs/*", "", "x" * 5000, "a\0b", "fifo", "no\nline"]
)
def test_sources_that_are_nowhere_are_refused(source: str) -> None:
    Path("docs/folder").mkdir(parents=True)
    os.mkfifo("fifo")
    with refusal(TextNotFoundError, repr(source[:200]), "must be a file", "check the path"):
        read_documents(source)


def test_a_folder_that_cannot_be_listed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write("docs/a.txt", "ay")
    write("docs/locked/b.txt", "bee")
    listdir = os.listdir

    def refuse(path: Any = ".") -> list[str]:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with refusal(TextNotFoundError, "'docs'", "docs/locked", "Permission denied", "check"):
        read_documents("docs")


@pytest.mark.parametrize("name", ["n" * 5000, "n/" * 3000, "a" * 300 + "/b.txt", "*" + "n" * 5000])
def test_a_refusal_is_short_however_long_the_name(name: str) -> None:
    with pytest.raises(TextNotFoundError) as caught:
        read_documents(name)
    assert len(str(caught.value)) < 700


def test_a_file_that_cannot_be_opened_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write("docs/a.txt", "ay")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with refusal(InvalidTextError, "docs/a.txt", "Permission denied", "check"):
        read_documents("docs")


def test_a_name_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with refusal(InvalidTextError, r"caf\udce9.txt", "must have a name in UTF-8", "rename"):
        read_documents(".")


def test_no_source_and_no_document_are_refused() -> None:
    with refusal(InvalidArgumentError, "text sources", "at least one", "got none", "name"):
        read_documents()
    Path("void").mkdir()
    write("docs/b.png", b"\0")
    with refusal(InvalidTextError, "void, docs", "must hold a document", "1 binary", "name"):
        read_documents("void", "docs")
    write("rows/blank.jsonl", '\n \n{"text": ""}\n')
    with refusal(InvalidTextError, "rows", "must hold a document", "0 binary", "name"):
        read_documents("rows")


# ------------------------------------------------------------------------------ .jsonl, .parquet


def test_jsonl_has_a_document_a_line() -> None:
    rows = b'\xef\xbb\xbf{"text": "ay\\r\\n", "n": 1}\r\n\n  \n{"text": ""}\n'
    write("a.jsonl", rows + '{"n": 2, "text": "bee\u2028cee"}'.encode())
    documents = read_documents("a.jsonl")
    assert texts(documents) == {"a.jsonl:1": "ay\r\n", "a.jsonl:5": "bee\u2028cee"}
    assert texts(documents) == texts(documents), "a second pass differs"
    assert documents.total_bytes == len("ay\r\nbee\u2028cee".encode())


def test_the_text_column_can_be_named() -> None:
    write_jsonl("docs/a.JSONL", {"text": "no", "body": "yes"})
    write_parquet("docs/b.parquet", text=["no"], body=["yes"])
    write("docs/c.txt", "all")
    assert texts(read_documents("docs", text_column="body")) == {
        "docs/a.JSONL:1": "yes",
        "docs/b.parquet:0": "yes",
        "docs/c.txt": "all",
    }


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{oops", ["cannot be read", "JSONDecodeError", "correct"]),
        ("[1]", ["cannot be read", "not a JSON object but list", "correct"]),
        ("null", ["cannot be read", "not a JSON object but NoneType", "correct"]),
        ("[" * 100_000, ["cannot be read", "RecursionError", "correct"]),
        (b'{"text": "\xff"}', ["cannot be read", "UnicodeDecodeError", "correct"]),
        (r'{"text": "\ud800"}', ["the text", "UTF-8 can hold", r"'\ud800'", "correct"]),
        ('{"text": 3}', ["'text'", "must hold strings", "int", "--text-column"]),
        ('{"text": true}', ["'text'", "must hold strings", "bool", "--text-column"]),
        ('{"text": ["x"]}', ["'text'", "must hold strings", "list", "--text-column"]),
        ('{"text": {"x": 1}}', ["'text'", "must hold strings", "dict", "--text-column"]),
    ],
)
def test_bad_jsonl_names_the_line(line: str | bytes, parts: list[str]) -> None:
    encoded = line.encode() if isinstance(line, str) else line
    write("a.jsonl", b'{"text": "good"}\n\n' + encoded + b"\n")
    with refusal(InvalidTextError, "a.jsonl:3: ", *parts):
        read_documents("a.jsonl")
    skipping = read_documents("a.jsonl", skip_bad=True)
    assert texts(skipping) == {"a.jsonl:1": "good"}
    (line,) = skipping.skipped
    assert line.startswith("a.jsonl:3: ")


def test_a_wrong_column_is_refused_before_any_reading() -> None:
    write_jsonl("a.jsonl", {"body": "x"})
    with refusal(InvalidTextError, "a.jsonl:1", "'body'"):
        read_documents("a.jsonl")
    write_parquet("a.parquet", body=["x"], n=[1])
    with refusal(InvalidTextError, "a.parquet:0", "'text'", "'body', 'n'", "--text-column"):
        read_documents("a.parquet")


def test_parquet_has_a_document_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PARQUET_BATCH_ROWS", 2)
    column = ["zero", None, "two", "", "four", "five"]
    write_parquet("a.parquet", row_group_size=3, n=list(range(6)), text=column)
    documents = read_documents("a.parquet")
    expected = {f"a.parquet:{row}": text for row, text in enumerate(column) if text}
    assert texts(documents) == expected
    assert texts(documents) == expected, "a second pass differs"
    assert documents.total_bytes == len("zerotwofourfive")


def test_bad_parquet_is_refused() -> None:
    write_parquet("numbers.parquet", text=[1, 2])
    with refusal(InvalidTextError, "numbers.parquet:0", "must hold strings", "int", "--text"):
        read_documents("numbers.parquet")
    write("not.parquet", "PAR1 but no more")
    with refusal(InvalidTextError, "not.parquet:0", "cannot be read", "Arrow", "leave it out"):
        read_documents("not.parquet")


@pytest.mark.parametrize(
    ("source", "module", "parts"),
    [
        ("a.parquet", "pyarrow.parquet", ["reading .parquet files", "pyarrow"]),
        ("hf:x", "datasets", ["reading hf: datasets", "datasets"]),
    ],
)
def test_missing_packages_are_named(
    source: str, module: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with refusal(
        MissingDependencyError,
        *parts,
        "pip install 'knnlm[data]' (from a clone: pip install '.[data]')",
    ):
        read_documents(source)


def test_rows_are_read_as_they_are_asked_for() -> None:
    lines = [json.dumps({"text": str(number)}).encode() for number in range(100)]
    write("a.jsonl", b"\n".join(lines))
    documents = read_documents("a.jsonl")
    write("a.jsonl", b"\n".join(lines) + b"\n{broken")
    again = iter(documents)
    assert [next(again).text for _ in range(100)] == list(map(str, range(100)))
    with pytest.raises(InvalidTextError, match=r"a\.jsonl:101: "):
        next(again)


# ------------------------------------------------------------------------------------------- hf:


@pytest.fixture
def offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both packages read their environment when imported, which may be long ago.
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_hf_datasets_are_streamed(folder: Path) -> None:
    rows = [{"n": 0, "text": "zero"}, {"n": 1, "text": ""}, {"n": 2, "text": None}]
    write_jsonl("set/train.jsonl", *rows, {"n": 3, "text": "three"})
    write_jsonl("set/test.jsonl", {"n": 4, "text": "four"})
    name = f"hf:{folder}/set"
    documents = read_documents(name)
    assert texts(documents) == {f"{name}:0": "zero", f"{name}:3": "three"}
    assert texts(documents) == texts(documents), "a second pass differs"
    assert documents.total_bytes is None
    split = f"{name}:test"
    assert texts(read_documents(split, split, "set/test.jsonl")) == {
        f"{split}:0": "four",
        "set/test.jsonl:1": "four",
    }


@pytest.mark.usefixtures("offline")
def test_hf_reads_parquet_and_names_wrong_columns(folder: Path) -> None:
    Path("set").mkdir()
    write_parquet("set/train.parquet", body=["ay", "bee"], n=[1, 2])
    name = f"hf:{folder}/set"
    assert texts(read_documents(name, text_column="body")) == {
        f"{name}:0": "ay",
        f"{name}:1": "bee",
    }
    with refusal(InvalidTextError, f"{name}:0", "'text'", "'body', 'n'", "--text-column"):
        read_documents(name)
    with refusal(InvalidTextError, f"{name}:0", "'n' must hold strings", "int"):
        read_documents(name, text_column="n")


@pytest.mark.parametrize(
    ("source", "arguments", "split"),
    [
        ("hf:a/b", ["a/b"], "train"),
        ("hf:a/b:test", ["a/b"], "test"),
        ("hf:a/b:dev", ["a/b"], "dev"),
        ("hf:a/b:valid", ["a/b"], "valid"),
        ("hf:a/b:validation", ["a/b"], "validation"),
        ("hf:a/b:wiki-2", ["a/b", "wiki-2"], "train"),
        ("hf:a/b:wiki-2:other", ["a/b", "wiki-2"], "other"),
        ("hf:a/b:train:test", ["a/b", "train"], "test"),
    ],
)
def test_hf_sources_name_config_and_split(
    source: str, arguments: list[str], split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load(*positional: str, **named: object) -> object:
        assert list(positional) == arguments
        assert named == {"split": split, "streaming": True}
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "row"}]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts(read_documents(source)) == {f"{source}:0": "row"}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d", "hf:a::test", "hf:a:b:", "hf::test"])
def test_malformed_hf_sources_are_refused(source: str) -> None:
    with refusal(TextNotFoundError, repr(source), "hf:NAME[:CONFIG][:SPLIT]", "check"):
        read_documents(source)


@pytest.mark.usefixtures("offline")
def test_hf_datasets_that_cannot_be_loaded_are_refused(folder: Path) -> None:
    write_jsonl("set/train.jsonl", {"text": "x"})
    with refusal(TextNotFoundError, "hf:no/such-set", "cannot be loaded", "check its name"):
        read_documents("hf:no/such-set")
    with refusal(TextNotFoundError, "set:test'", "cannot be loaded", "check its name"):
        read_documents(f"hf:{folder}/set:test")


def test_an_hf_dataset_that_breaks_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise ConnectionError("the line went dead\nand stayed so")

    streamed = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    documents = iter(read_documents("hf:x"))
    assert next(documents).name == "hf:x:0"
    with refusal(InvalidTextError, "hf:x:1", "ConnectionError: the line went dead", "leave it out"):
        next(documents)


def test_other_columns_of_an_hf_dataset_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    streamed = datasets.IterableDataset.from_generator(
        lambda: iter([{"text": "a caption", "image": {"bytes": b"broken", "path": None}}]),
        features=datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()}),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    assert texts(read_documents("hf:x")) == {"hf:x:0": "a caption"}


def test_reading_a_document_late_or_never_does_not_read_ahead() -> None:
    def endless() -> Iterator[Document]:
        for number in itertools.count():
            yield Document(str(number), "text")

    documents = Documents([endless], total_bytes=None)
    assert [document.name for document in itertools.islice(documents, 3)] == ["0", "1", "2"]
