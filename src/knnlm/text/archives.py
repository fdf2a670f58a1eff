"""Zip archives → their members that may hold text.

Knows names and bytes, no text. A member's name is never a path on this machine: nothing is
unpacked. What a member claims to be larger than is never read.
"""

import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, cast

from knnlm.errors import InvalidTextError

SUFFIX = ".zip"
_FREE_BYTES = 64 << 20
_MOST_TIMES = 100
"""An archive may unpack to _FREE_BYTES and this many times its own size: text takes 3 to 20."""
_NOT_TEXT = "__MACOSX"


@dataclass(frozen=True)
class Archive:
    """A zip archive; whatever prevents reading it is an InvalidTextError of one line."""

    path: Path

    @cached_property
    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise InvalidTextError(
                f"zip archive {self.path} cannot be read ({reason}): copy it again, or leave it out"
            ) from error

    def members(self) -> list[str]:
        """Return the names of its files, sorted, without hidden and empty ones.

        Raises InvalidTextError for an archive that unpacks to far more than text does.
        """
        files = {each.filename: each.file_size for each in self._opened.infolist()}
        total, size = sum(files.values()), self.path.stat().st_size
        most = _FREE_BYTES + _MOST_TIMES * size
        if total > most:
            raise InvalidTextError(
                f"zip archive {self.path} must unpack to at most {most} bytes, {_MOST_TIMES} times "
                f"its size and {_FREE_BYTES >> 20} MiB, but would to {total}: unpack it yourself, "
                "or leave it out"
            )
        return sorted(name for name, size in files.items() if size and not _is_left_out(name))

    def member(self, name: str) -> "Member":
        """Return a member. Raises InvalidTextError for a name that leads out, or a password."""
        place = f"zip archive {self.path}: member {name!a}"
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise InvalidTextError(
                f"{place} must have a path within the archive: unpack it yourself, or leave it out"
            )
        info = self._opened.getinfo(name)
        if info.flag_bits & 1:
            raise InvalidTextError(
                f"{place} must be readable without a password: unpack it yourself, or leave it out"
            )
        return Member(self, name, info.file_size)

    def open(self, name: str) -> io.BufferedIOBase:
        """Open a member's bytes; raises OSError."""
        try:
            opened: IO[bytes] = self._opened.open(name)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise OSError(str(error)) from error
        return cast(io.BufferedIOBase, opened)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive. size_bytes: unpacked."""

    archive: Archive
    name: str
    size_bytes: int

    def open(self) -> io.BufferedIOBase:
        """Open its bytes; raises OSError."""
        return self.archive.open(self.name)


def _is_left_out(name: str) -> bool:
    """Return whether a member is a folder, hidden, or what one system adds to its archives."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") and part != ".." for part in parts)
    return name.endswith("/") or hidden or parts[:1] == (_NOT_TEXT,)
