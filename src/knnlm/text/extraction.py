"""Web pages, PDFs and notebooks → their text.

One document for each file. Knows formats, no documents; holds the file and its text in memory.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from knnlm.choices import TextFormat
from knnlm.errors import InvalidTextError, import_optional
from knnlm.progress import Advance
from knnlm.text.decoding import TextFile

EXTRA = "files"
KINDS = {
    TextFormat.html: "a web page",
    TextFormat.pdf: "a PDF",
    TextFormat.notebook: "a notebook",
}
"""The formats whose text is extracted, as messages name them."""
_PASSWORD_ERROR = 4  # FPDF_ERR_PASSWORD
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHARSET = re.compile(rb"""<meta[^>]*charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_HEAD_BYTES = 1024  # in which a page must say its encoding
_DECLARATION = re.compile(r"^\s*<\?xml.*?\?>", re.DOTALL)
_HYPHEN = re.compile("[\x02\ufffe](\n)?")  # as PDFium marks words that are cut at line ends


class _UnreadableError(ValueError):
    """A file is not of its format; the message says why."""


def extract_text(file: TextFile, text_format: TextFormat, advance: Advance | None = None) -> str:
    """Return a file's text, which is empty if it has none, else ends with a line end.

    advance: called with the bytes that are read. Raises InvalidTextError, and
    MissingDependencyError for the packages of the extra.
    """
    with file.opened(advance) as opened:
        data = opened.read()
    try:
        match text_format:
            case TextFormat.html:
                text = _html_text(data, file.encoding)
            case TextFormat.pdf:
                text = _pdf_text(data)
            case _:
                text = _notebook_text(data)
        text.encode()
    except (_UnreadableError, UnicodeError) as error:
        raise InvalidTextError(
            f"text file {file} must be {KINDS[text_format]}, but cannot be read as one ({error}): "
            "leave it out, or convert it to text"
        ) from error
    text = text.strip()
    return f"{text}\n" if text else ""


def _html_text(data: bytes, encoding: str) -> str:
    """Return what a page shows: no scripts, no styles, no title."""
    inscriptis = import_optional("inscriptis", "reading .html files", EXTRA)
    source = _DECLARATION.sub("", _decode_page(data, encoding))
    try:
        text: str = inscriptis.get_text(source) if source.strip() else ""
    except (ValueError, AssertionError, RecursionError) as error:  # lxml's errors are ValueErrors
        raise _UnreadableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return "\n".join(line.rstrip() for line in text.splitlines())


def _decode_page(data: bytes, encoding: str) -> str:
    """Decode a page by its byte order mark, by what it says itself, or else as is asked for."""
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return data.decode(name)
    if said := _CHARSET.search(data[:_HEAD_BYTES]):
        name = said[1].decode("ascii")
        try:
            return data.decode(name)
        except LookupError as error:
            raise _UnreadableError(f"it says that its encoding is {name}") from error
    return data.decode(encoding)


def _pdf_text(data: bytes) -> str:
    """Return the text of all pages, with a blank line between two."""
    pdfium = import_optional("pypdfium2", "reading .pdf files", EXTRA)
    try:
        with closing(pdfium.PdfDocument(data)) as document:
            return "\n\n".join(_page_texts(document))
    except pdfium.PdfiumError as error:
        if getattr(error, "err_code", None) == _PASSWORD_ERROR:
            raise _UnreadableError("it is encrypted and needs a password") from error
        raise _UnreadableError(str(error)) from error


def _page_texts(document: Any) -> Iterator[str]:
    for page in document:
        with closing(page), closing(page.get_textpage()) as text:
            lines = str(text.get_text_bounded()).replace("\r\n", "\n").replace("\r", "\n")
            yield _HYPHEN.sub("", lines).replace("\0", "").strip()


def _notebook_text(data: bytes) -> str:
    """Return the sources of markdown and code cells in order, with a blank line between two."""
    try:
        notebook = json.loads(data)
        sheets = [notebook] if "cells" in notebook else notebook["worksheets"]  # until version 3
        cells = [_cell_text(cell) for sheet in sheets for cell in sheet["cells"]]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise _UnreadableError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return "\n\n".join(cell for cell in cells if cell)


def _cell_text(cell: dict[str, Any]) -> str:
    if cell["cell_type"] not in ("markdown", "code", "heading"):
        return ""
    source = cell["source"] if "source" in cell else cell["input"]
    return str(source if isinstance(source, str) else "".join(source)).strip()
