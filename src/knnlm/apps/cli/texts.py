"""The texts of a command: its options about them, their check, and what was left out of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knnlm.apps.cli.console import ERR
from knnlm.choices import TextFormat

if TYPE_CHECKING:
    from knnlm.text.documents import Documents


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How to read the texts; see `knnlm.read_documents`."""

    text_column: str
    id_column: str | None
    encoding: str
    text_format: TextFormat
    skip_bad: bool
    chat: bool = False
    gitignore: bool = True


@contextmanager
def checked_texts(sources: Sequence[str], options: TextOptions) -> "Iterator[Documents]":
    """Check text sources and yield their documents; at the end, name what was left out as bad."""
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    documents = knnlm.read_documents(
        *sources,
        text_column=options.text_column,
        id_column=options.id_column,
        encoding=options.encoding,
        text_format=options.text_format,
        skip_bad=options.skip_bad,
        chat=options.chat,
        gitignore=options.gitignore,
        progress=RichProgress(transient=True),
    )
    try:
        yield documents
    finally:
        if documents.skipped:
            ERR.print(f"left out {len(documents.skipped)} that cannot be read:", soft_wrap=True)
        for line in documents.skipped:
            ERR.print(f"  {' '.join(line.split())}", soft_wrap=True)
