"""All text sources, read from beginning to end before the first document is used.

What can be known without a model is known here: that files are there and can be read, their kind,
their encoding, their rows and columns. Only datasets of hf: are streamed, and fail where they fail.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from knnlm.choices import TextFormat
from knnlm.errors import InvalidTextError
from knnlm.progress import Advance, Progress
from knnlm.text.archives import SUFFIX as ARCHIVE_SUFFIX, Archive
from knnlm.text.decoding import TextFile
from knnlm.text.documents import Document, Documents, Source
from knnlm.text.extraction import KINDS, extract_text
from knnlm.text.hugging_face import hf_rows, load_dataset
from knnlm.text.ignoring import Ignored
from knnlm.text.paths import find_files, path_identity
from knnlm.text.pipes import STDIN, is_pipe, spool
from knnlm.text.rows import FIRST_ROW, Columns, Rows, json_format, read_rows

_FORMATS = {
    ".jsonl": TextFormat.jsonl,
    ".ndjson": TextFormat.jsonl,
    ".json": TextFormat.json,
    ".csv": TextFormat.csv,
    ".tsv": TextFormat.tsv,
    ".parquet": TextFormat.parquet,
    ".html": TextFormat.html,
    ".htm": TextFormat.html,
    ".xhtml": TextFormat.html,
    ".pdf": TextFormat.pdf,
    ".ipynb": TextFormat.notebook,
}
_DOCUMENTS = frozenset({TextFormat.text, *KINDS})
"""The formats with one document."""

_BINARY = frozenset({TextFormat.parquet, *KINDS})
"""Those whose readers say themselves what is no file of their kind."""

_Reader = Callable[[], Iterator[Document]]
_MakeText = Callable[[Advance | None], str]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Part:
    """A file or a dataset of the corpus.

    name: as it was given. identity: of the file; STDIN for pipes. holders: the identities of the
    folder and the archive that it was found in. is_argument: whether it was named itself.
    """

    name: str
    identity: str
    file: TextFile | None = None
    dataset: Any = None
    holders: tuple[str, ...] = ()
    is_argument: bool = False


class Check:
    """Finds the files and datasets of all sources, then reads each of them once, in order.

    binaries: how many binary files were skipped. documents: how many documents were found.
    """

    def __init__(
        self,
        columns: Columns,
        encoding: str,
        text_format: TextFormat,
        *,
        skip_bad: bool,
        gitignore: bool,
    ) -> None:
        self.binaries = self.documents = 0
        self._columns = columns
        self._encoding = encoding
        self._format = text_format
        self._skip_bad = skip_bad
        self._ignored = Ignored() if gitignore else None
        self._parts: dict[str | Path, _Part] = {}
        self._sources: dict[Source, None] = {}
        self._skipped: list[str] = []
        self._incomplete: set[str] = set()  # identities of what has skipped parts
        self._rows_without_text = 0
        self._files_without_text: list[str] = []
        self._text_bytes = 0

    def find(self, source: str) -> None:
        """Add the parts of a source. Raises TextNotFoundError and InvalidTextError."""
        if source.startswith("hf:"):
            part = _Part(source, source, dataset=load_dataset(source))
            self._parts.setdefault(source, part)
        elif is_pipe(source):
            file = TextFile(spool(source), self._encoding, source)
            self._parts[file.path] = _Part(source, STDIN, file, is_argument=True)
        else:
            self._find_files(source)

    def _find_files(self, source: str) -> None:
        holders: tuple[str, ...] = ()

        def skip_folder(path: Path, error: OSError) -> None:
            self._skip(f"folder {path} cannot be listed ({error.strerror})", *holders)

        if source and _is_folder(source):
            holders = (path_identity(Path(source)),)
            self._sources[Source(*holders, rows=False)] = None
        for name in find_files(source, skip_folder if self._skip_bad else None, self._ignored):
            path = Path(name)
            if path.suffix.lower() == ARCHIVE_SUFFIX:
                self._find_members(name, Archive(path), holders)
                continue
            file = TextFile(path, self._encoding)
            part = _Part(name, path_identity(path), file, None, holders, name == source)
            known = self._parts.setdefault(path.resolve(), part)
            known.is_argument |= part.is_argument

    def _find_members(self, name: str, archive: Archive, holders: tuple[str, ...]) -> None:
        identity = path_identity(archive.path)
        self._sources[Source(identity, rows=False)] = None
        holders = (*holders, identity)
        with self._skipping(*holders):
            for member in archive.members():
                with self._skipping(*holders):
                    label = f"{name}/{member}"
                    found = archive.member(member)
                    file = TextFile(archive.path, self._encoding, label, found)
                    part = _Part(label, f"{identity}/{member}", file, None, holders)
                    self._parts.setdefault(part.identity, part)

    def run(self, progress: Progress) -> Documents:
        """Read everything. Raises InvalidTextError, unless what is bad is to be skipped."""
        readers: list[_Reader] = []
        sizes = [_stored_bytes(part) for part in self._parts.values()]
        with progress.task("check", sum(sizes), "bytes") as advance:
            for part, size_bytes in zip(self._parts.values(), sizes, strict=True):
                meter = _Meter(advance, size_bytes)
                with self._skipping(part.identity, *part.holders):
                    readers += self._check(part, meter)
                meter.finish()
        self._say_what_was_left_out()
        streamed = any(part.file is None for part in self._parts.values())
        sources = [each for each in self._sources if each.identity not in self._incomplete]
        total_bytes = None if streamed else self._text_bytes
        return Documents(readers, total_bytes, sources, self._skipped)

    def _say_what_was_left_out(self) -> None:
        if self.binaries:
            logger.warning("skipped %d binary files among the text sources", self.binaries)
        if self._rows_without_text:
            logger.warning(
                "left out %d rows whose text is null, missing or empty", self._rows_without_text
            )
        if files := self._files_without_text:
            logger.warning("left out %d files that have no text, first: %s", len(files), files[0])
        if (ignored := self._ignored) is not None and (ignored.files or ignored.folders):
            logger.warning(
                "left out %d files and %d folders that .gitignore names; --no-gitignore reads them",
                ignored.files,
                ignored.folders,
            )

    @contextmanager
    def _skipping(self, *identities: str) -> Iterator[None]:
        """Leave out what cannot be read, if asked to; identities: of what is then incomplete."""
        try:
            yield
        except InvalidTextError as error:
            if not self._skip_bad:
                raise
            self._skip(str(error), *identities)

    def _skip(self, line: str, *identities: str) -> None:
        if line not in self._skipped:  # the second reading finds it again
            self._skipped.append(line)
        self._incomplete.update(identities)

    def _skip_in(self, part: _Part, error: InvalidTextError) -> None:
        self._skip(str(error), part.identity, *part.holders)

    def _check(self, part: _Part, advance: Advance) -> list[_Reader]:
        """Read a part; return what reads it again: nothing for files without text."""
        file = part.file
        if file is None:
            return [self._check_dataset(part)]
        _check_name(part.name)
        text_format = self._format
        if text_format is TextFormat.auto:
            text_format = _FORMATS.get(file.suffix, TextFormat.text)
        content = file.content(binary=text_format in _BINARY)
        if content != "text" and part.is_argument:
            raise InvalidTextError(
                f"text file {part.name} must hold {file.encoding_name} text, but is {content}: "
                "leave it out or convert it"
            )
        if content not in ("text", "empty"):
            self.binaries += 1
            return []
        if content == "text" and self._format is TextFormat.auto and file.suffix == ".json":
            text_format = json_format(file)
        if text_format not in _DOCUMENTS and part.identity != STDIN:
            self._sources[Source(part.identity, rows=True)] = None
        elif part.is_argument and part.identity != STDIN:
            self._sources[Source(part.identity, rows=False)] = None
        if content == "empty":
            return []
        if text_format in _DOCUMENTS and self._columns.chat:
            raise InvalidTextError(
                f"text file {part.name} must have rows with conversations, such as a .jsonl file, "
                "but is one text: leave it out, or store it without --chat"
            )
        if text_format in KINDS:
            return self._check_made(part, partial(extract_text, file, text_format), advance)
        if text_format is TextFormat.text and file.member is not None:
            return self._check_made(part, file.text, advance)
        if text_format is TextFormat.text:
            return [self._check_text(part, file, advance)]
        return [self._check_rows(part, file, text_format, advance)]

    def _check_text(self, part: _Part, file: TextFile, advance: Advance) -> _Reader:
        text_bytes = sum(len(piece.encode()) for piece in file.pieces(advance))
        document = _of_pipe(Document(part.name, file.path, part.identity, self._encoding))
        self.documents += 1
        self._text_bytes += text_bytes
        return partial(iter, (document,))

    def _check_made(self, part: _Part, read: _MakeText, advance: Advance) -> list[_Reader]:
        """Read a file whose text is made of what it holds, each time that it is needed."""
        text = read(advance)
        if not text and part.is_argument:
            raise InvalidTextError(
                f"text file {part.name} must hold text, but has none: a PDF of scanned pages needs "
                "OCR first"
            )
        if not text:
            self._files_without_text.append(part.name)
            return []
        self.documents += 1
        self._text_bytes += len(text.encode())

        def documents() -> Iterator[Document]:
            yield _of_pipe(Document(part.name, read(None), part.identity))

        return [documents]

    def _check_rows(
        self, part: _Part, file: TextFile, text_format: TextFormat, advance: Advance
    ) -> _Reader:
        def rows(advance: Advance | None = None) -> Rows:
            return Rows(
                part.name,
                part.identity,
                partial(read_rows, file, text_format, self._columns, advance),
                self._columns,
                first=FIRST_ROW.get(text_format, 0),
                on_bad=partial(self._skip_in, part) if self._skip_bad else None,
            )

        checked = rows(advance)
        for document in checked.documents():
            self.documents += 1
            self._text_bytes += document.size_bytes
        self._rows_without_text += checked.without_text
        return rows().documents

    def _check_dataset(self, part: _Part) -> _Reader:
        """Read the first document, which finds a wrong column before anyone loads a model."""
        rows = Rows(
            part.name,
            part.identity,
            partial(hf_rows, part.dataset, self._columns, part.name),
            self._columns,
            on_bad=partial(self._skip_in, part) if self._skip_bad else None,
            breaks_off=True,
        )
        self.documents += next(rows.documents(), None) is not None
        self._sources[Source(part.identity, rows=True)] = None
        return rows.documents


def _of_pipe(document: Document) -> Document:
    """Return a document; that of a pipe with an identity of its text: another is another one."""
    if document.identity != STDIN:
        return document
    return replace(document, identity=f"{STDIN}#{document.fingerprint()[:16]}")


class _Meter:
    """Reports a file's progress: never more than its size, and all of it at the end."""

    def __init__(self, advance: Advance, size_bytes: int) -> None:
        self._advance = advance
        self._left = float(size_bytes)

    def __call__(self, amount: float, total: float | None = None, note: str | None = None) -> None:
        amount = min(amount, self._left)
        self._left -= amount
        self._advance(amount)

    def finish(self) -> None:
        self(self._left)


def _is_folder(source: str) -> bool:
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # no name of a file at all, which is refused by find_files
        return False


def _stored_bytes(part: _Part) -> int:
    try:
        return 0 if part.file is None else part.file.stored_bytes
    except InvalidTextError:
        return 0  # it is refused when it is its turn


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"text file {name!a} must have a name in UTF-8: rename it"
        ) from error
