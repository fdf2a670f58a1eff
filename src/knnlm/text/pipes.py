"""The standard input and other pipes, which can be read only once: they are kept in a file."""

import io
import os
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import cast

from knnlm.errors import InvalidTextError, TextNotFoundError
from knnlm.text.paths import not_found

STDIN = "-"
_STDIN_NAMES = frozenset({STDIN, "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"})
_WAIT_SECONDS = 3.0  # for someone to write to a named pipe
_READ_BYTES = 1 << 20


def is_pipe(source: str) -> bool:
    """Return whether a text source is the standard input or another pipe."""
    try:
        return source in _STDIN_NAMES or Path(source).is_fifo()
    except (OSError, ValueError):  # no name of a file at all, which is refused elsewhere
        return False


def spool(source: str) -> Path:
    """Read a pipe to its end; return a file with its contents, which lasts as long as the process.

    Raises TextNotFoundError for a pipe that nothing writes to, and InvalidTextError.
    """
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    path = folder / (Path(source).name or STDIN)  # the end of its name tells what it holds
    try:
        with path.open("wb") as file:
            if source in _STDIN_NAMES:
                shutil.copyfileobj(_standard_input(), file)
            else:
                _copy_pipe(source, file)
    except OSError as error:
        if isinstance(error, TextNotFoundError):
            raise
        raise InvalidTextError(
            f"text source {source!r} cannot be read to its end ({error.strerror or error}): save "
            "it as a file and name that"
        ) from error
    return path


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="knnlm-")


def _standard_input() -> io.BufferedIOBase:
    if sys.stdin is None:
        raise OSError(0, "it is closed")
    return cast(io.BufferedIOBase, sys.stdin.buffer)


def _copy_pipe(source: str, file: io.BufferedIOBase) -> None:
    # a blocking open would wait for a writer for ever
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as pipe:  # noqa: PTH123
        stop = time.monotonic() + _WAIT_SECONDS
        while (begin := pipe.read(_READ_BYTES)) == b"":
            if time.monotonic() > stop:
                raise not_found(source, "nothing is written to the pipe")
            time.sleep(0.02)
        os.set_blocking(descriptor, True)
        file.write(begin or b"")  # None: a writer is there, who has written nothing yet
        shutil.copyfileobj(pipe, file)
