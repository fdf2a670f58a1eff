"""Formats with rows → documents: .jsonl, .json, .csv, .tsv, .parquet, and datasets of hf:.

One treatment for all of them: a row whose text is null, missing or empty gives no document; one
whose text is no string is refused. Holds a row (of .json the file, of .parquet a few rows) and the
identities of a source's rows in memory.
"""

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from knnlm.choices import TextFormat
from knnlm.errors import InvalidArgumentError, InvalidTextError, KNNLMError, import_optional
from knnlm.progress import Advance
from knnlm.text.conversations import check_messages, conversation_to_text
from knnlm.text.decoding import TextFile
from knnlm.text.documents import Document, check_utf8

PARQUET_BATCH_ROWS = 256
MISSING = object()
"""Stands for the value of a column that a row does not have."""

Row = Mapping[str, object] | Exception | None
"""A row; None for a blank line, and an exception for a row that is malformed by itself."""
NumberedRows = Iterator[tuple[int, Row]]
FIRST_ROW = {TextFormat.jsonl: 1, TextFormat.csv: 2, TextFormat.tsv: 2}
"""The number of the first row: lines count from 1, with a header, other rows from 0."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold a row's text and, if there is one, its id; a.b is the field b of a.

    chat: whether the text is a conversation, a list of messages.
    """

    text: str = "text"
    id: str | None = None
    chat: bool = False

    @property
    def names(self) -> list[str]:
        """Both names."""
        return [self.text] if self.id is None else [self.text, self.id]


@dataclass(slots=True)
class Rows:
    """The rows of one source, read as documents.

    name, identity: of the source. read: yields its numbered rows, from `first` on. on_bad: called
    with the error of a row that cannot be read, which is then left out; by default the error is
    raised. breaks_off: whether an error that ends the source is raised all the same. without_text:
    how many rows had none so far.
    """

    name: str
    identity: str
    read: Callable[[], NumberedRows]
    columns: Columns
    first: int = 0
    on_bad: Callable[[InvalidTextError], None] | None = None
    breaks_off: bool = False
    without_text: int = 0

    def documents(self) -> Iterator[Document]:
        """Yield a document for each row with text. Raises InvalidTextError."""
        taken: dict[str, int] = {}  # how many rows had this key
        first_row: tuple[int, list[str]] | None = None
        has_column, number = False, self.first - 1
        try:
            for number, row in self.read():
                if isinstance(row, Mapping) and not has_column:
                    first_row = first_row or (number, list(row))
                    has_column = value_of(row, self.columns.text) is not MISSING
                try:
                    document = self._document(number, row, taken)
                except InvalidTextError as error:
                    if self.on_bad is None:
                        raise
                    self.on_bad(error)
                    continue
                if document is not None:
                    yield document
            if first_row is not None and not has_column:
                raise missing_column(f"{self.name}:{first_row[0]}", self.columns.text, first_row[1])
        except KNNLMError as error:
            self._end(error)
        except (
            Exception
        ) as error:  # pyarrow and datasets have dozens, from bad bytes to HTTP errors
            self._end(unreadable_row(f"{self.name}:{number + 1}", error))

    def _end(self, error: KNNLMError) -> None:
        if self.on_bad is None or self.breaks_off or not isinstance(error, InvalidTextError):
            raise error
        self.on_bad(error)

    def _document(self, number: int, row: Row, taken: dict[str, int]) -> Document | None:
        place = f"{self.name}:{number}"
        if isinstance(row, Exception):
            raise unreadable_row(place, row)
        if row is None:
            return None
        text = self._text(place, row)
        if not text:
            self.without_text += 1
            return None
        if self.columns.id is None:
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
        else:
            key = self._id(place, row)
            if key in taken:
                raise InvalidTextError(
                    f"{place}: id_column {self.columns.id!r} must tell rows apart, but another row "
                    f"has {key!r} too: choose another (--id-column)"
                )
        taken[key] = taken.get(key, 0) + 1
        again = f"-{taken[key]}" if taken[key] > 1 else ""
        name = place if self.columns.id is None else f"{self.name}:{key}"
        identity = f"{self.identity}#{key}{again}"
        return Document(name, text, identity, chat=self.columns.chat)

    def _text(self, place: str, row: Mapping[str, object]) -> str | None:
        text = value_of(row, self.columns.text)
        if text is None or text is MISSING:
            return None
        if self.columns.chat:
            return _conversation(f"{place}: {self.columns.text}", text)
        if not isinstance(text, str):
            raise InvalidTextError(
                f"{place}: text_column {self.columns.text!r} must hold strings, got "
                f"{type(text).__name__}: choose another (--text-column)"
            )
        check_utf8(f"{place}: the text", text)  # JSON can spell what UTF-8 cannot: "\ud800"
        return text

    def _id(self, place: str, row: Mapping[str, object]) -> str:
        column = str(self.columns.id)
        value = value_of(row, column)
        if value is MISSING:
            raise missing_column(place, column, list(row), "id_column")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise InvalidTextError(
                f"{place}: id_column {column!r} must hold strings or whole numbers, got "
                f"{type(value).__name__ if value != '' else 'an empty one'}: choose another "
                "(--id-column)"
            )
        check_utf8(f"{place}: the id", str(value))
        return str(value)


def _conversation(place: str, messages: object) -> str | None:
    """Return a conversation as a document's text, None if it has no answer to store."""
    try:
        check_messages(messages, place)
    except InvalidArgumentError as error:
        raise InvalidTextError(f"{error} (--text-column)") from error
    assert isinstance(messages, Sequence)
    if not any(message["role"] == "assistant" for message in messages):
        return None
    return conversation_to_text(messages)


def missing_column(
    place: str, column: str, columns: Iterable[str], argument: str = "text_column"
) -> InvalidTextError:
    """Return the error for rows without the column that is asked for."""
    return InvalidTextError(
        f"{place}: {argument} {column!r} must be one of the columns, which are "
        f"{', '.join(map(repr, columns)) or 'none'}: choose one (--{argument.replace('_', '-')})"
    )


def unreadable_row(place: str, error: Exception) -> InvalidTextError:
    """Return the error for a row that is malformed."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return InvalidTextError(f"{place}: the row cannot be read ({reason}): correct or leave it out")


def value_of(row: Mapping[str, object], column: str) -> object:
    """Return a row's value, of a column of that very name or of a nested one."""
    if column in row:
        return row[column]
    head, dot, rest = column.partition(".")
    if not dot or head not in row:
        return MISSING
    inner = row[head]
    if isinstance(inner, Mapping):
        return value_of(inner, rest)
    return inner  # null where an object is expected, or what is refused as no string


def read_rows(
    file: TextFile, text_format: TextFormat, columns: Columns, advance: Advance | None = None
) -> NumberedRows:
    """Yield a file's numbered rows.

    advance: called with the bytes that are read. Raises whatever prevents reading on.
    """
    match text_format:
        case TextFormat.jsonl:
            return _jsonl_rows(file, advance)
        case TextFormat.json:
            return _json_rows(file, advance)
        case TextFormat.parquet:
            return _parquet_rows(file, columns, advance)
    return _csv_rows(file, "\t" if text_format is TextFormat.tsv else ",", columns, advance)


def json_format(file: TextFile) -> TextFormat:
    """Return what a .json file holds: rows in an array or in lines, else a text like any other."""
    lines = (line for line in file.lines() if line.strip())
    first, second = next(lines, ""), next(lines, "")
    start = (first + second).split(maxsplit=1)
    opening = "".join("".join(start)[:2]) if start else ""
    if opening[:2] in ("[{", "[]"):
        return TextFormat.json
    if second and isinstance(_parsed(first), dict) and isinstance(_parsed(second), dict):
        return TextFormat.jsonl
    return TextFormat.text


def _parsed(line: str) -> Any:
    """Return a line's JSON value, or the exception that it raises."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _object(value: Any) -> Row:
    if isinstance(value, Mapping | Exception):
        return value
    return TypeError(f"not a JSON object but {type(value).__name__}")


def _jsonl_rows(file: TextFile, advance: Advance | None) -> NumberedRows:
    if "\n".encode(file.encoding) != b"\n":  # UTF-16 and its like
        for number, line in enumerate(file.lines(advance), start=1):
            yield number, _object(_parsed(line)) if line.strip() else None
        return
    encoding = "utf-8-sig" if file.encoding == "utf-8" else file.encoding
    with file.opened(advance) as opened:
        for number, data in enumerate(opened, start=1):
            if not data.strip():
                yield number, None
                continue
            try:
                line = data.decode(encoding)
            except UnicodeError as error:
                yield number, error
            else:
                yield number, _object(_parsed(line))


def _json_rows(file: TextFile, advance: Advance | None) -> NumberedRows:
    rows = json.loads(file.text(advance))
    if not isinstance(rows, list):
        raise TypeError(f"not a JSON array but {type(rows).__name__}")
    for number, row in enumerate(rows):
        yield number, _object(row)


def _csv_rows(
    file: TextFile, delimiter: str, columns: Columns, advance: Advance | None
) -> NumberedRows:
    # Python's own limit, which holds for the whole process, is 128 KiB: too little for a text.
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))
    # Strict: a quotation mark out of place would make one field of all that follows it.
    reader = csv.reader(file.lines(advance), delimiter=delimiter, strict=True)
    header = next(reader, [])
    for argument, column in zip(("text_column", "id_column"), columns.names, strict=False):
        if header and column not in header:
            raise missing_column(f"{file}:1", column, header, argument)
        if header.count(column) > 1:
            raise ValueError(f"the header has {column!r} {header.count(column)} times")
    for number, fields in enumerate(reader, start=2):
        if not fields:
            yield number, None
        elif len(fields) != len(header):
            yield number, ValueError(f"it has {len(fields)} fields, the header {len(header)}")
        else:
            yield number, dict(zip(header, fields, strict=True))


def _parquet_rows(file: TextFile, columns: Columns, advance: Advance | None) -> NumberedRows:
    parquet = import_optional("pyarrow.parquet", "reading .parquet files", "data")
    with _seekable(file, advance) as opened, parquet.ParquetFile(opened) as table:
        names = table.schema_arrow.names
        for argument, column in zip(("text_column", "id_column"), columns.names, strict=False):
            if column not in names and column.partition(".")[0] not in names:
                raise missing_column(f"{file}:0", column, names, argument)
        number = 0
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=columns.names):
            for row in batch.to_pylist():
                yield number, row
                number += 1


@contextmanager
def _seekable(file: TextFile, advance: Advance | None) -> Iterator[Any]:
    """Open a file to jump about in; a compressed one is first decompressed to the disk."""
    with file.opened(advance) as opened:
        if file.stored_as_is:
            yield opened
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(opened, whole)
            whole.seek(0)
            yield whole
