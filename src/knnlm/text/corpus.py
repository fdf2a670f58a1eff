"""Files, folders, globs and Hugging Face datasets → documents.

Knows text but no tokens. Holds no more than a block or a row in memory.
"""

import codecs
import glob
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES, ENOENT
from functools import partial
from pathlib import Path
from typing import Any, Literal

from knnlm.errors import (
    InvalidArgumentError,
    InvalidTextError,
    KNNLMError,
    TextNotFoundError,
    import_optional,
)

BLOCK_CHARACTERS = 1 << 20
SNIFFED_BYTES = 1 << 13
PARQUET_BATCH_ROWS = 256
SPLITS = frozenset({"train", "validation", "valid", "dev", "test"})

Row = Mapping[str, object]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """A named text; a file's text is read only when it is needed.

    identity: what makes it the same document when it is built again; None: its name.
    """

    name: str
    text: str | Path
    identity: str | None = None

    @property
    def size_bytes(self) -> int:
        """The text's size in UTF-8 (a file's byte order mark counts)."""
        if isinstance(self.text, Path):
            with _reading(self.text):
                return self.text.stat().st_size
        return len(self.text.encode())

    def blocks(self) -> Iterator[str]:
        """Yield the text in pieces of at most BLOCK_CHARACTERS, cut after line ends if possible.

        Where the cuts fall depends on the text alone, not on where it is stored.
        """
        rest = ""
        for piece in _decoded(self.text) if isinstance(self.text, Path) else (self.text,):
            rest += piece
            start = 0
            while len(rest) - start > BLOCK_CHARACTERS:
                limit = start + BLOCK_CHARACTERS
                cut = rest.rfind("\n", start, limit) + 1 or limit
                yield rest[start:cut]
                start = cut
            rest = rest[start:]
        if rest:
            yield rest

    def fingerprint(self) -> str:
        """Return the SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block.encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """A file, folder or dataset that documents were read from; rows: whether it holds rows."""

    identity: str
    rows: bool


class Documents:
    """A corpus, which can be iterated over repeatedly, always in the same order."""

    def __init__(
        self,
        readers: Sequence[Callable[[], Iterator[Document]]],
        total_bytes: int | None,
        sources: tuple[Source, ...] = (),
    ) -> None:
        self._readers = readers
        self.sources = sources
        self.total_bytes = total_bytes
        """Size of the files as stored, for progress; None if a dataset is streamed."""

    def __iter__(self) -> Iterator[Document]:
        for reader in self._readers:
            yield from reader()


def read_documents(*sources: str | Path, text_column: str = "text") -> Documents:
    """Return the documents of files, folders, glob patterns and `hf:NAME[:CONFIG][:SPLIT]`.

    Any UTF-8 file is one document; .jsonl and .parquet files hold one in each row's `text_column`.
    In folders (read recursively, without following links to folders) and globs, which match files
    only, hidden names, empty files and binary files are left out.
    """
    if not sources:
        raise InvalidArgumentError("text sources: at least one is needed, got none: name a file")
    readers: list[Callable[[], Iterator[Document]]] = []
    seen: set[Path] = set()
    binaries: set[Path] = set()
    total_bytes, streamed = 0, False
    for source in dict.fromkeys(map(str, sources)):
        if source.startswith("hf:"):
            rows = partial(_hf_rows, _load_hf(source), text_column)
            readers.append(partial(_row_documents, source, rows, text_column, 0))
            streamed = True
            continue
        for path in _files(source):
            _check_name(path)
            resolved, content = Path(path).resolve(), _sniff(path)
            with _reading(path):
                size_bytes = resolved.stat().st_size
            if content != "text" and path == source:
                raise InvalidTextError(
                    f"text file {path} must hold UTF-8 text, but is {content}: "
                    "leave it out or convert it"
                )
            if content == "binary":
                binaries.add(resolved)
            if content == "text" and resolved not in seen:
                seen.add(resolved)
                readers.append(_reader(path, text_column))
                total_bytes += size_bytes
    if binaries:
        logger.warning("skipped %d binary files among the text sources", len(binaries))
    documents = Documents(readers, None if streamed else total_bytes)
    # Reading the first one also finds a wrong text_column before anyone loads a model.
    if next(iter(documents), None) is None:
        raise InvalidTextError(
            f"text sources {', '.join(map(str, sources))} must hold a document, but hold none "
            f"({len(binaries)} binary files skipped): name files with text"
        )
    return documents


def as_documents(
    given: Iterable[Document] | str | Path | Sequence[str | Path],
) -> Iterable[Document]:
    """Return documents unchanged, or read those of one or several text sources.

    Raises InvalidArgumentError for anything else; an iterator is checked as it is consumed.
    """
    if isinstance(given, str | Path):
        return read_documents(given)
    if isinstance(given, Documents):
        return given
    if isinstance(given, Document) or not isinstance(given, Iterable):
        raise _not_documents(given)
    if not isinstance(given, Sequence):
        return _checked(given)
    if given and all(isinstance(source, str | Path) for source in given):
        return read_documents(*map(str, given))
    return list(_checked(given))


def _checked(documents: Iterable[object]) -> Iterator[Document]:
    for document in documents:
        if not isinstance(document, Document):
            raise _not_documents(document, " among others")
        yield document


def _not_documents(given: object, place: str = "") -> InvalidArgumentError:
    return InvalidArgumentError(
        "documents must be an iterable of Document objects, or paths of texts, got "
        f"{type(given).__name__}{place}: see read_documents"
    )


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"text file {path!a} must have a name in UTF-8: rename it"
        ) from error


def _files(source: str) -> list[str]:
    path = Path(source)
    try:
        if source and path.is_file():
            return [source]
        if source and path.is_dir():
            return sorted(_files_below(path))
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 (skips hidden names)
        files = [match for match in matches if Path(match).is_file()]
        reason = "" if files else _absence(source, matches)
    except (OSError, ValueError) as error:  # no permission, a name too long or with a NUL in it
        files, reason = [], _first_line(error)
    if not files:
        raise TextNotFoundError(
            f"text source {source[:200]!r} must be a file, a folder, a glob pattern with matches "
            f"or hf:NAME[:CONFIG][:SPLIT], but {reason}: check the path"
        )
    return files


def _absence(source: str, matches: list[str]) -> str:
    """Return why a text source has no files. Raises OSError for a folder that is not readable."""
    path = Path(source)
    if path.is_symlink() and not path.exists():
        return "it is a link to nothing"
    if source and path.exists():
        return "it is neither a file nor a folder"
    if matches:
        return "its matches are no files"
    for folder in reversed(path.parents):  # glob finds nothing where it may not look
        if glob.has_magic(str(folder)):
            break
        if folder.is_dir():
            next(folder.iterdir(), None)
    return "nothing is there"


def _files_below(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path.as_posix()
        elif path.is_dir() and not path.is_symlink():
            yield from _files_below(path)


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn an OSError into an InvalidTextError of one line."""
    try:
        yield
    except OSError as error:
        remedies = {ENOENT: "check that it is there", EACCES: "check its permissions"}
        remedy = remedies.get(error.errno or 0, "leave it out")
        raise InvalidTextError(
            f"text file {path} cannot be read ({error.strerror or error}): {remedy}"
        ) from error


def _sniff(path: str) -> Literal["text", "empty", "binary"]:
    with _reading(path), Path(path).open("rb") as file:
        head = file.read(SNIFFED_BYTES)
    if not head.removeprefix(codecs.BOM_UTF8):
        return "empty"
    return "binary" if b"\0" in head and Path(path).suffix.lower() != ".parquet" else "text"


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _reading(path), path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        data = b"\n"
        while data:
            undecoded_bytes = len(decoder.getstate()[0])  # a character cut by the last read
            offset = file.tell() - undecoded_bytes
            data = file.read(BLOCK_CHARACTERS)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise InvalidTextError(
                    f"text file {path} must be UTF-8, but byte {offset + error.start} is not "
                    f"({error.reason}): convert it to UTF-8 or leave it out"
                ) from error


def _reader(path: str, text_column: str) -> Callable[[], Iterator[Document]]:
    suffix = Path(path).suffix.lower()
    if suffix == ".jsonl":
        return partial(_row_documents, path, partial(_jsonl_rows, path), text_column, 1)
    if suffix == ".parquet":
        parquet = import_optional("pyarrow.parquet", "reading .parquet files", "data")
        rows = partial(_parquet_rows, parquet, path, text_column)
        return partial(_row_documents, path, rows, text_column, 0)
    return partial(iter, (Document(path, Path(path)),))


def _row_documents(
    source: str, rows: Callable[[], Iterator[Row | None]], text_column: str, first: int
) -> Iterator[Document]:
    """Yield a document for each row with text, numbered from `first`; a None row only counts."""
    name = f"{source}:{first}"
    try:
        for number, row in enumerate(rows(), start=first):
            name = f"{source}:{number}"
            if row is not None and (text := _text(name, text_column, row)):
                yield Document(name, text)
            name = f"{source}:{number + 1}"
    except KNNLMError:
        raise
    except Exception as error:  # pyarrow and datasets have dozens, from bad bytes to HTTP errors
        raise InvalidTextError(
            f"{name}: the row cannot be read ({_first_line(error)}): correct or leave it out"
        ) from error


def _text(name: str, text_column: str, row: Row) -> str:
    if text_column not in row:
        raise InvalidTextError(
            f"{name}: text_column {text_column!r} must be one of the columns, which are "
            f"{', '.join(map(repr, row)) or 'none'}: choose one (--text-column)"
        )
    text = row[text_column]
    if not isinstance(text, str):
        raise InvalidTextError(
            f"{name}: text_column {text_column!r} must hold strings, got {type(text).__name__}: "
            "choose another (--text-column)"
        )
    text.encode()  # JSON can spell what UTF-8 cannot: "\ud800"
    return text


def _jsonl_rows(path: str) -> Iterator[Row | None]:
    with _reading(path), Path(path).open("rb") as file:
        for line in file:
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
            if not isinstance(row, dict):
                raise TypeError(f"not a JSON object but {type(row).__name__}")
            yield row if line.strip() else None


def _parquet_rows(parquet: Any, path: str, text_column: str) -> Iterator[Row | None]:
    with _reading(path), Path(path).open("rb") as opened, parquet.ParquetFile(opened) as file:
        columns = file.schema_arrow.names
        if text_column not in columns:
            yield dict.fromkeys(columns)
        for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                yield None if text is None else {text_column: text}


def _load_hf(source: str) -> Any:
    datasets = import_optional("datasets", "reading hf: datasets", "data")
    parts = source.split(":")[1:]
    has_split = len(parts) == 3 or (len(parts) == 2 and parts[1] in SPLITS)
    split = parts.pop() if has_split else "train"
    try:
        if len(parts) > 2 or "" in (*parts, split):
            raise ValueError("the form is hf:NAME[:CONFIG][:SPLIT]")
        return datasets.load_dataset(*parts, split=split, streaming=True)
    except Exception as error:  # datasets has dozens, from HTTP errors to bad configurations
        raise TextNotFoundError(
            f"text source {source!r} cannot be loaded as a Hugging Face dataset "
            f"({_first_line(error)}): check its name, config and split, and the network"
        ) from error


def _hf_rows(dataset: Any, text_column: str) -> Iterator[Row | None]:
    if text_column in (dataset.column_names or ()):  # spares decoding images and audio
        dataset = dataset.select_columns([text_column])
    for row in dataset:
        yield None if row.get(text_column, "") is None else row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
