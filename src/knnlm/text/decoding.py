"""Files → text: compression, encodings, and which files are no text at all.

Knows bytes and characters, no documents. Holds no more than a piece in memory.
"""

import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import EACCES, ENOENT
from pathlib import Path, PurePath
from typing import Any
from zipfile import BadZipFile

from knnlm.errors import InvalidArgumentError, InvalidTextError, import_optional
from knnlm.progress import Advance
from knnlm.text.archives import Member

UTF8 = "utf-8"
PIECE_BYTES = 1 << 20
SNIFFED_BYTES = 1 << 13
COMPRESSED = frozenset({".gz", ".zst"})

# The first bytes of binary kinds that may have no NUL among their first 8 KiB.
_SIGNATURES = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a zip archive or an office document",
    b"\x89PNG\r\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "compressed by gzip, without a name that ends in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd, without a name that ends in .zst",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!\x1a": "a rar archive",
    b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "an old office document",
    b"\x93NUMPY": "a NumPy array",
}
# Longer marks first: UTF-32's begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTROL = re.compile(r"[\x01-\x06\x0e-\x1a\x1c-\x1f\x7f]")
_FEWEST_BYTES = 8  # fewer are taken for UTF-16 only with its mark
_MOST_CONTROL = 0.05  # compressed data has 10 %, text none


def check_encoding(name: str) -> str:
    """Return a text encoding's usual name; raises InvalidArgumentError if Python knows none."""
    try:
        found = codecs.lookup(name)
        if not getattr(found, "_is_text_encoding", True) or found.incrementaldecoder is None:
            raise LookupError("it does not decode to text")
        found.incrementaldecoder().decode(b"", True)
    except (LookupError, ValueError) as error:
        raise InvalidArgumentError(
            f"encoding must be the name of a text encoding, got {name[:200]!a}: try utf-8, utf-16, "
            "cp1252, latin-1, shift_jis, gb18030, …"
        ) from error
    return found.name


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of text, which may be compressed.

    label: what messages call it, by default its path. member: what is read where `path` is an
    archive. Whatever prevents reading it, in any method, is an InvalidTextError of one line.
    """

    path: Path
    encoding: str = UTF8
    label: str | None = None
    member: Member | None = None

    def __str__(self) -> str:
        return self.label or str(self.path)

    @property
    def _name(self) -> PurePath:
        return self.path if self.member is None else PurePath(self.member.name)

    @property
    def compression(self) -> str:
        """The suffix of its compression, or an empty string."""
        suffix = self._name.suffix.lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def suffix(self) -> str:
        """The suffix that tells the kind of text: .jsonl for a.jsonl.gz."""
        name = self._name.with_suffix("") if self.compression else self._name
        return name.suffix.lower()

    @property
    def stored_bytes(self) -> int:
        """The size of the file as it is stored, of a member of an archive unpacked."""
        if self.member is not None:
            return self.member.size_bytes
        with self.reading():
            return self.path.stat().st_size

    @property
    def stored_as_utf8(self) -> bool:
        """Whether its bytes are those of its text in UTF-8."""
        return self.encoding == UTF8 and self.stored_as_is

    @property
    def stored_as_is(self) -> bool:
        """Whether its bytes lie in a file of their own, where one can jump about in them."""
        return not self.compression and self.member is None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn the errors of reading and decompressing into an InvalidTextError."""
        try:
            yield
        except (OSError, EOFError, zlib.error, lzma.LZMAError, BadZipFile) as error:
            code = error.errno if isinstance(error, OSError) else None
            remedies = {ENOENT: "check that it is there", EACCES: "check its permissions"}
            remedy = remedies.get(code or 0, "leave it out")
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise InvalidTextError(
                f"text file {self} cannot be read ({reason}): {remedy}"
            ) from error

    @contextmanager
    def opened(self, advance: Advance | None = None) -> Iterator[io.BufferedIOBase]:
        """Open its bytes, decompressed. advance: called with the stored bytes that are read."""
        with self.reading(), ExitStack() as stack:
            opened = self.path.open("rb") if self.member is None else self.member.open()
            stored: io.BufferedIOBase = stack.enter_context(opened)
            if advance is not None:
                stored = io.BufferedReader(_Metered(stored, advance), PIECE_BYTES)
            if self.compression == ".gz":
                stored = stack.enter_context(gzip.GzipFile(fileobj=stored))
            elif self.compression == ".zst":
                arrow = import_optional("pyarrow", "reading .zst files", "data")
                stream = arrow.CompressedInputStream(arrow.PythonFile(stored, "r"), "zstd")
                stored = io.BufferedReader(stack.enter_context(stream), PIECE_BYTES)
            yield stored

    def content(self, *, binary: bool) -> str:
        """Return "text", "empty", or what kind of binary file it is.

        binary: whether its format is one of binary files, so that only an empty one is no text.
        Raises InvalidTextError for UTF-16 and UTF-32, whose zeros would make them binary files.
        """
        with self.opened() as file:
            head = _read(file, SNIFFED_BYTES)
        if binary:
            return "text" if head else "empty"
        for signature, kind in _SIGNATURES.items():
            if head.startswith(signature):
                return f"binary ({kind})"
        if self.encoding == UTF8 and (other := _unicode_other_than_utf8(head)):
            raise self._refusal(
                f"begins as {other.upper()} does", f"read it with --encoding {other}"
            )
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        text = decoder.decode(head, final=len(head) < SNIFFED_BYTES).removeprefix("\ufeff")
        if not text:
            return "empty"
        control = len(_CONTROL.findall(text))
        return "binary" if "\0" in text or control > _MOST_CONTROL * len(text) else "text"

    def pieces(self, advance: Advance | None = None) -> Iterator[str]:
        """Yield the text without its byte order mark, in pieces of at most PIECE_BYTES bytes."""
        decoder = codecs.getincrementaldecoder(self.encoding)()
        bytes_read, begun = 0, False
        with self.opened(advance) as file:
            data = b"\n"
            while data:
                undecoded_bytes = len(decoder.getstate()[0])  # a character cut by the last read
                offset = bytes_read - undecoded_bytes
                data = file.read(PIECE_BYTES)
                try:
                    text = decoder.decode(data, final=not data)
                    if self.encoding != UTF8:
                        text.encode()  # UTF-7 and some others can spell halves of characters
                except UnicodeError as error:
                    raise self._not_decoded(error, offset) from error
                bytes_read += len(data)
                if text and not begun:
                    text, begun = text.removeprefix("\ufeff"), True
                yield text

    def text(self, advance: Advance | None = None) -> str:
        """Return the whole text."""
        return "".join(self.pieces(advance))

    def lines(self, advance: Advance | None = None) -> Iterator[str]:
        r"""Yield the text's lines with their ends; only \n ends a line."""
        begun: list[str] = []  # the line that the next piece may continue
        for piece in self.pieces(advance):
            *lines, rest = piece.split("\n")
            for line in lines:
                yield "".join((*begun, line, "\n"))
                begun = []
            begun.append(rest)
        if last := "".join(begun):
            yield last

    @property
    def encoding_name(self) -> str:
        """The encoding as messages name it."""
        return "UTF-8" if self.encoding == UTF8 else self.encoding

    def _not_decoded(self, error: UnicodeError, offset: int) -> InvalidTextError:
        place = "its text is not"
        if isinstance(error, UnicodeDecodeError):
            place = f"byte {offset + error.start} is not"
        remedy = "name its encoding with --encoding (cp1252, latin-1, shift_jis, gb18030, …)"
        return self._refusal(f"{place} ({getattr(error, 'reason', error)})", remedy)

    def _refusal(self, reason: str, remedy: str) -> InvalidTextError:
        return InvalidTextError(
            f"text file {self} must be {self.encoding_name}, but {reason}: convert it to UTF-8, "
            f"leave it out, or {remedy}"
        )


class _Metered(io.RawIOBase):
    """A file that reports how many of its bytes are read."""

    def __init__(self, file: io.BufferedIOBase, advance: Advance) -> None:
        self._file = file
        self._advance = advance

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._advance(len(data))
        return len(data)


def _read(file: io.BufferedIOBase, size_bytes: int) -> bytes:
    """Read that many bytes, fewer only at the end: a decompressor may give fewer at a time."""
    parts: list[bytes] = []
    while size_bytes and (data := file.read(size_bytes)):
        parts.append(data)
        size_bytes -= len(data)
    return b"".join(parts)


def _unicode_other_than_utf8(head: bytes) -> str | None:
    """Return the encoding of UTF-16 or UTF-32 text, recognized by its mark or by its zeros."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    head = head[:SNIFFED_BYTES]
    if len(head) < _FEWEST_BYTES:
        return None
    zeros = [head[place::2].count(0) for place in (0, 1)]
    for name, many, few in (("utf-16-le", zeros[1], zeros[0]), ("utf-16-be", zeros[0], zeros[1])):
        if few == 0 and many > len(head) // 5:
            text = head[: len(head) // 2 * 2].decode(name, "replace")
            if all(character.isprintable() or character.isspace() for character in text):
                return name
    return None
