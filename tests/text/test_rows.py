"""The same rows give the same documents, whatever format holds them."""

import csv
import gzip
import io
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal

from knnlm.errors import InvalidTextError
from knnlm.text.sources import read_documents

Rows = list[dict[str, Any]]
MISSING = object()
TEXTS = [
    *("plain", 'with "quotes", commas\tand tabs', "two\nlines\r\n", " ", "é中🙂", "x" * 200_000),
    *("\ufeffmark", "0", "null", "{}"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_json(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def as_csv(rows: Rows, delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(file, columns, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "jsonl": as_jsonl,
    "ndjson": as_jsonl,
    "json": as_json,
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "parquet": as_parquet,
}


def write(name: str, data: bytes) -> str:
    """Write a file, compressed if its name says so."""
    path = Path(name)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        import pyarrow

        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return name


def as_hf(rows: Rows, monkeypatch: pytest.MonkeyPatch, features: Any = None) -> str:
    import datasets

    def each() -> Iterator[dict[str, Any]]:
        yield from rows

    streamed = datasets.IterableDataset.from_generator(each, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    return "hf:x"


def outcome(source: str, **options: Any) -> tuple[list[str], list[str]] | str:
    """Texts and ids of a source's documents, or which rule refuses it."""
    try:
        documents = list(read_documents(source, **options))
    except InvalidTextError as error:
        (rule,) = [
            rule
            for rule in ("must hold strings", "must hold a document", "one of the columns")
            if rule in str(error)
        ]
        return rule
    ids = [str(document.identity).partition("#")[2] for document in documents]
    return [str(document.text) for document in documents], ids


@pytest.mark.parametrize("seed", range(8))
def test_the_same_rows_give_the_same_documents(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(seed)
    values = [*drawn.choices(TEXTS, k=6), *drawn.choices([None, "", MISSING], k=3)]
    drawn.shuffle(values)
    values.insert(0, "first")  # the streamed one knows no other columns than its first row's
    rows: Rows = [{"id": number, "text": value} for number, value in enumerate(values)]
    sparse = [{k: v for k, v in row.items() if v is not MISSING} for row in rows]
    full = [{**row, "text": row.get("text")} for row in sparse]
    for options in ({}, {"id_column": "id"}):
        wanted = [str(row["text"]) for row in full if row["text"]]
        results = {"hf": outcome(as_hf(sparse, monkeypatch), **options)}
        for name, written in FORMATS.items():
            for suffix in ("", ".gz", ".zst"):
                given = sparse if name in ("jsonl", "ndjson", "json") else full
                file = write(f"rows.{name}{suffix}", written(given))
                results[name + suffix] = outcome(file, **options)
        assert results["jsonl"][0] == wanted
        assert all(result == results["jsonl"] for result in results.values()), results


@pytest.mark.parametrize("value", [3, 2.5, True, ["a"], {"a": "b"}], ids=repr)
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_no_string_is_refused_everywhere(
    value: object, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Rows = [{"text": None}, {"text": None}, {"text": None}]
    rows[place] = {"text": value}
    sources = [write(f"a.{name}", FORMATS[name](rows)) for name in ("jsonl", "json", "parquet")]
    for source in [*sources, as_hf(rows, monkeypatch)]:
        assert outcome(source) == "must hold strings", source
    if not isinstance(value, list | dict):  # in .csv everything is text
        assert outcome(write("a.csv", as_csv(rows))) == ([str(value)], outcome("a.csv")[1])


def test_nested_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Rows = [
        {"meta": {"text": "one", "n": 1}},
        {"meta": None},
        {"meta": {"text": None, "n": 2}},
    ]
    rows += [{"meta": {"text": "four", "n": 4}}]
    sources = [write(f"a.{name}", FORMATS[name](rows)) for name in ("jsonl", "json", "parquet")]
    for source in [*sources, as_hf(rows, monkeypatch)]:
        assert outcome(source, text_column="meta.text", id_column="meta.n") == (
            ["one", "four"],
            ["1", "4"],
        )
        assert outcome(source, text_column="meta") == "must hold strings"
        assert outcome(source, text_column="other.text") == "one of the columns"
    flat = [{"meta.text": "dotted", "meta": "x"}]
    sources = [write(f"b.{name}", written(flat)) for name, written in FORMATS.items()]
    for source in [*sources, as_hf(flat, monkeypatch)]:
        assert outcome(source, text_column="meta.text")[0] == ["dotted"]


def test_a_column_that_no_row_has_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"body": "x", "id": 1}, {"body": "y", "id": 2}]
    sources = [write(f"a.{name}", written(rows)) for name, written in FORMATS.items()]
    for source in [*sources, as_hf(rows, monkeypatch)]:
        with refusal(InvalidTextError, "text_column 'text'", "'body', 'id'", "--text-column"):
            read_documents(source)
        with refusal(InvalidTextError, "id_column 'no'", "'body'", "--id-column"):
            read_documents(source, text_column="body", id_column="no")


def test_rows_are_identified_by_their_text_or_their_id() -> None:
    rows = [{"text": "same", "id": "a"}, {"text": "other", "id": "b"}, {"text": "same", "id": "c"}]
    path = str(Path(write("a.jsonl", as_jsonl(rows))).resolve())
    one, two, three = read_documents("a.jsonl")
    assert one.identity == f"{path}#0967115f2813a3541eaef77de9d9d577"[: len(path) + 17]
    assert three.identity == f"{one.identity}-2"
    assert [one.name, two.name, three.name] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    named = list(read_documents("./a.jsonl", id_column="id"))
    assert [each.identity for each in named] == [f"{path}#a", f"{path}#b", f"{path}#c"]
    assert [each.name for each in named] == ["./a.jsonl:a", "./a.jsonl:b", "./a.jsonl:c"]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (None, ["NoneType"]),
        (1.5, ["float"]),
        (True, ["bool"]),
        ("", ["an empty one"]),
        ("a", ["must tell rows apart", "'a'"]),
    ],
)
def test_bad_ids_are_refused(value: object, parts: list[str]) -> None:
    write("a.jsonl", as_jsonl([{"text": "x", "id": "a"}, {"text": "y", "id": value}]))
    with refusal(InvalidTextError, "a.jsonl:2: id_column 'id'", *parts, "--id-column"):
        read_documents("a.jsonl", id_column="id")
    documents = read_documents("a.jsonl", id_column="id", skip_bad=True)
    assert [document.name for document in documents] == ["a.jsonl:a"]
    assert documents.sources == (), "the row may be there tomorrow"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"text,n\nx\n", "it has 1 fields, the header 2"),
        (b"text,n\na, b,1\n", "it has 3 fields, the header 2"),
        (b'text,n\n"a,1\n', "unexpected end of data"),
        (b'text,n\n"a"b,1\n', "expected after"),
        (b"text,text\na,b\n", "'text' 2 times"),
    ],
)
def test_csv_that_would_be_misread_is_refused(data: bytes, reason: str) -> None:
    write("a.csv", data)
    with refusal(InvalidTextError, "a.csv:2: the row cannot be read", reason, "leave it out"):
        read_documents("a.csv")


def test_csv_rows_have_the_numbers_of_a_spreadsheet() -> None:
    write("a.csv", b'\xef\xbb\xbftext,n\r\n"two\nlines",1\r\n\r\nb,2\r\n')
    names = {document.name: document.text for document in read_documents("a.csv")}
    assert names == {"a.csv:2": "two\nlines", "a.csv:4": "b"}


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b'{"text": "one object"}', None),
        (b'{\n "text": "one object"\n}\n', None),
        (b'["a", "b"]', None),
        (b"3", None),
        (b'{"text": "a"}\n{"text": "b"}\n', 2),
        (b'\xef\xbb\xbf [ {"text": "a"}]', 1),
        (b"[]", 0),
    ],
)
def test_json_holds_rows_or_is_a_text(data: bytes, count: int | None) -> None:
    write("a.json", data)
    write("b.txt", b"b")
    documents = list(read_documents("a.json", "b.txt"))[:-1]
    if count is None:
        assert ["".join(each.blocks()) for each in documents] == [data.decode()]
    else:
        assert len(documents) == count


@pytest.mark.parametrize("data", [b'[{"text": "a"}, 3]', b'[{"text": "a"},', b'[{"text": "a"}]]'])
def test_broken_json_is_refused(data: bytes) -> None:
    write("a.json", data)
    with refusal(InvalidTextError, "a.json:", "cannot be read", "leave it out"):
        read_documents("a.json")


def test_a_format_can_be_named() -> None:
    write("a.csv", b"not,a\ntable\n")
    write("lines", as_jsonl([{"text": "x"}]))
    (text,) = read_documents("a.csv", text_format="text")
    assert "".join(text.blocks()) == "not,a\ntable\n"
    (row,) = read_documents("lines", text_format="jsonl")
    assert row.text == "x"


def test_zstd_as_the_program_writes_it() -> None:
    write("a.txt", b"text\n" * 1000)
    try:
        subprocess.run(["zstd", "-q", "a.txt"], check=True)
    except FileNotFoundError:
        pytest.skip("the program zstd is not installed")
    (document,) = read_documents("a.txt.zst")
    assert "".join(document.blocks()) == "text\n" * 1000
    assert document.size_bytes == 5000
