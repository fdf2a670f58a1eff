"""The terminal: results on the standard output, errors and warnings on the standard error.

The only place that writes to either, so that names and texts move no cursor, unusual encodings and
widths lose no message, and a full disk is an error of one line.
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

# Control characters except tab and newline, line separators, characters that reverse what follows,
# and halves of characters, which no encoding holds.
_INVISIBLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]",
)
_SIZES = {"COLUMNS": (40, 1000), "LINES": (10, 1000)}  # in narrower ones, tables lose their numbers


class _Stream:
    """The standard output or error, whichever object stands for it now.

    A write to the output that fails ends the command; one to the standard error is dropped, as
    there is no place left to report it.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _now(self) -> Any:
        stream = getattr(sys, self._name)
        # while a bar is shown, Rich stands in for the streams and would write to itself
        return getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:
        """The encoding of what is written; Rich draws tables in ASCII where it is not UTF-8."""
        return getattr(self._now, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether a person is looking."""
        return self._now is not None and bool(self._now.isatty())

    def fileno(self) -> int:
        """Return the file descriptor, if there is one."""
        return -1 if self._now is None else int(self._now.fileno())

    def write(self, text: str) -> int:
        """Write text that is safe to show."""
        try:
            if self._now is None:
                raise OSError(0, "it is closed")
            self._now.write(text)
        except OSError as error:
            self.fail(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            if self._now is not None:
                self._now.flush()
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        """End the command with exit status 1 if results cannot be written.

        A reader that has seen enough is no error: then nothing is printed.
        """
        with contextlib.suppress(OSError, ValueError):  # nothing left over may fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self._name == "stdout":
            if not isinstance(error, BrokenPipeError):
                print_error(f"cannot write the output: {error.strerror or error}")
            raise SystemExit(1) from error


class _Terminal(Console):
    """Shows names and texts as they are: no [markup], no :emoji:, no control characters."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(file=cast(TextIO, stream), highlight=False, markup=False, emoji=False)

    @property  # type: ignore[misc]
    def size(self) -> ConsoleDimensions:
        """The width and height in characters, of a usable size."""
        width, height = super().size
        return ConsoleDimensions(
            _clamped(width, *_SIZES["COLUMNS"]), _clamped(height, *_SIZES["LINES"])
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as Rich's text; escapes are in it, so that its width is right."""
        shown = visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(shown, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the pieces of anything printed: whatever it is, no control character passes."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


class LogHandler(logging.Handler):
    """Writes log records to the standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        ERR.print(self.format(record), soft_wrap=True)


def _clamped(number: float, least: int, most: int) -> int:
    return int(min(max(number, least), most))


def _correct_sizes() -> None:
    """Correct COLUMNS and LINES, which Rich trusts: it shows nothing in 0 and fails at ²."""
    for name, (least, most) in _SIZES.items():
        given = os.environ.pop(name, "")
        if given.isascii() and given.isdigit():
            os.environ[name] = str(_clamped(float(given), least, most))


_correct_sizes()
STDOUT = _Stream("stdout")
OUT = _Terminal(STDOUT)
ERR = _Terminal(_Stream("stderr"))


def prepare_streams() -> None:
    """Make both streams take every character, and keep their places from files if closed."""
    for number, stream in (1, sys.stdout), (2, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def visible(text: str) -> str:
    r"""Return a text with control characters, except tab and newline, as escapes such as \x1b."""
    return _INVISIBLE.sub(_escape, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return a name as `visible`, on one line."""
    return re.sub(r"[\t\n]", _escape, visible(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def amount(number: float, unit: str) -> str:
    """Return a number as people read it: 12,345 tokens, 12.3 M bytes."""
    if unit == "bytes":
        for prefix in ("", "k", "M", "G"):
            if number < 1000:
                return f"{number:.3g} {prefix}".rstrip()
            number /= 1000
        return f"{number:.3g} T"
    return f"{number:,.0f}"


def print_error(message: str) -> None:
    """Print an error message on the standard error, on one line."""
    ERR.print(f"error: {' '.join(message.split())}", soft_wrap=True)


def print_continuation(prompt: str, text: str) -> None:
    """Print a prompt and its continuation with every space, tab and line end of theirs."""
    # as segments, because Rich wraps the lines of a text and expands its tabs
    parts = [Segment(prompt, Style(dim=True)), Segment(text), Segment.line()]
    OUT.print(Segments(parts), soft_wrap=True)


def print_piece(text: str) -> None:
    """Print a piece of a text that goes on, with every space, tab and line end of its own."""
    OUT.print(Segments([Segment(text)]), soft_wrap=True, end="")


def print_json(value: object) -> None:
    """Print one JSON value on one line; infinite and undefined numbers become null."""
    text = json.dumps(_finite(value), ensure_ascii=not OUT.encoding.startswith("utf"))
    text = _INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    OUT.print(text, soft_wrap=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value
