"""Documents: named texts with an identity, read when they are needed.

Knows text but no tokens. Holds no more than a block in memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.text.decoding import UTF8, TextFile

BLOCK_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """A named text; a file's text is read only when it is needed.

    name: what reports show. text: a string, or a file, which may end in .gz or .zst. identity: what
    makes it the same document when it is built again; None stands for the name. encoding: of the
    file. chat: whether the text is a conversation, of which only the answers are stored; see
    `conversation_to_text`. Raises InvalidTextError for strings that UTF-8 cannot hold.
    """

    name: str
    text: str | Path
    identity: str | None = None
    encoding: str = UTF8
    chat: bool = False

    def __post_init__(self) -> None:
        check_utf8(f"the name of document {self.name!a}", self.name)
        if self.identity is not None:
            check_utf8(f"the identity of document {self.name!r}", self.identity)
        if isinstance(self.text, str):
            check_utf8(f"the text of document {self.name!r}", self.text)

    @property
    def size_bytes(self) -> int:
        """The text's size in UTF-8 (a file's byte order mark may count)."""
        if isinstance(self.text, str):
            return len(self.text.encode())
        file = TextFile(self.text, self.encoding)
        if file.stored_as_utf8:
            return file.stored_bytes
        return sum(len(block.encode()) for block in self.blocks())

    def blocks(self) -> Iterator[str]:
        """Yield the text in pieces of at most BLOCK_CHARACTERS, cut after line ends if possible.

        Where the cuts fall depends on the text alone, not on where it is stored.
        """
        rest = ""
        for piece in self._pieces():
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

    def _pieces(self) -> Iterable[str]:
        if isinstance(self.text, str):
            return (self.text,)
        return TextFile(self.text, self.encoding).pieces()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the text's UTF-8 bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block.encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """Something that documents were read from, to its end.

    A document belongs to it if its identity is the source's own, or goes on after it with "/" (the
    files of a folder) or "#" (rows). rows: whether it is a file or dataset with rows.
    """

    identity: str
    rows: bool


class Documents:
    """A corpus, which can be iterated over repeatedly, always in the same order."""

    def __init__(
        self,
        readers: Sequence[Callable[[], Iterator[Document]]],
        total_bytes: int | None,
        sources: Sequence[Source] = (),
        skipped: Sequence[str] = (),
    ) -> None:
        self._readers = readers
        self.total_bytes = total_bytes
        """Size of all texts in UTF-8, for progress; None if a dataset is streamed."""
        self.sources = tuple(sources)
        """What was read whole. A source of which something was skipped is not among them."""
        self.skipped = skipped
        """One line for each file and row that was left out because it cannot be read."""

    def __iter__(self) -> Iterator[Document]:
        for reader in self._readers:
            yield from reader()


def check_utf8(what: str, text: str) -> None:
    """Raise InvalidTextError for a string that UTF-8 cannot hold: one with half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTextError(
            f"{what} must be text that UTF-8 can hold, but its character {error.start} is the half "
            f"character {text[error.start]!a}: correct it"
        ) from error


def checked_documents(documents: Iterable[object]) -> Iterator[Document]:
    """Yield documents; raises InvalidArgumentError at anything else."""
    for document in documents:
        if not isinstance(document, Document):
            raise not_documents(document, " among others")
        yield document


def not_documents(given: object, place: str = "") -> InvalidArgumentError:
    """Return the error for something that is given instead of documents."""
    return InvalidArgumentError(
        "documents must be an iterable of Document objects, or paths of texts, got "
        f"{type(given).__name__}{place}: see read_documents"
    )
