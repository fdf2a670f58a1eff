"""What is given as text → documents: the arguments of the library and of the command line."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from knnlm.choices import TextFormat, parse_choice
from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.progress import SILENT, Progress
from knnlm.text.checking import Check
from knnlm.text.decoding import UTF8, check_encoding
from knnlm.text.documents import Document, Documents, checked_documents, not_documents
from knnlm.text.rows import Columns


def read_documents(
    *sources: str | Path,
    text_column: str = "text",
    id_column: str | None = None,
    encoding: str = UTF8,
    text_format: str = TextFormat.auto,
    skip_bad: bool = False,
    chat: bool = False,
    gitignore: bool = True,
    progress: Progress = SILENT,
) -> Documents:
    """Check text sources from beginning to end, and return their documents.

    Sources are files, folders, glob patterns, "-" for the standard input, pipes, and
    `hf:NAME[:CONFIG][:SPLIT]`. A file is one document, of .html and .pdf files their text, of
    .ipynb notebooks their markdown and code; .jsonl, .ndjson, .csv, .tsv and .parquet files, and
    .json files with an array of objects, hold one in each row that has text. All may be compressed
    (.gz, .zst), or lie in a .zip archive, of which every member is read as a file is. In folders
    (read recursively, without following links to folders), globs, which match files only, and
    archives, hidden names, empty files and binary files are left out.

    text_column: of rows; a.b is the field b of column a.
    id_column: tells the rows of a source apart when it is read again; by default their text does.
    encoding: of every file but .parquet.
    text_format: of every file, see `TextFormat`; by default the end of its name tells.
    skip_bad: leave out files and rows that cannot be read, and name them in `Documents.skipped`.

    gitignore: leave out of folders what .gitignore files in them say, and of a git work tree what
    those above and .git/info/exclude say.

    chat: every row holds a conversation in text_column: a list of messages like {"role": "user",
    "content": "Hello"}. They are read through the model's chat template, and only what the
    assistant says is stored. A row without an answer counts as one without text.

    Files are read twice: here, and when the documents are used. Raises InvalidArgumentError,
    TextNotFoundError, InvalidTextError, MissingDependencyError.
    """
    if not sources:
        raise InvalidArgumentError("text sources: at least one is needed, got none: name a file")
    check = Check(
        Columns(text_column, id_column, chat),
        check_encoding(encoding),
        parse_choice(TextFormat, "text_format", text_format),
        skip_bad=skip_bad,
        gitignore=gitignore,
    )
    for source in dict.fromkeys(map(str, sources)):
        check.find(source)
    documents = check.run(progress)
    if not check.documents:
        raise InvalidTextError(
            f"text sources {', '.join(map(str, sources))} must hold a document, but hold none "
            f"({check.binaries} binary files skipped{_left_out(documents.skipped)}): name files "
            "with text; what is stored of emptied ones goes with: knnlm forget"
        )
    return documents


def _left_out(skipped: Sequence[str]) -> str:
    return f", {len(skipped)} that cannot be read, first: {skipped[0]}" if skipped else ""


def as_documents(
    given: Iterable[Document] | str | Path | Sequence[str | Path], progress: Progress = SILENT
) -> Iterable[Document]:
    """Return documents unchanged, or check and read those of one or several text sources.

    Raises InvalidArgumentError for anything else; an iterator is checked as it is consumed.
    """
    if isinstance(given, str | Path):
        return read_documents(given, progress=progress)
    if isinstance(given, Documents):
        return given
    if isinstance(given, Document) or not isinstance(given, Iterable):
        raise not_documents(given)
    if not isinstance(given, Sequence):
        return checked_documents(given)
    if given and all(isinstance(source, str | Path) for source in given):
        return read_documents(*map(str, given), progress=progress)
    return list(checked_documents(given))
