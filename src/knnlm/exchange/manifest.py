"""The two files that an export writes beside its arrays, and that an import reads again.

knnlm.json says what the arrays are and where they come from; documents.jsonl has a line for each
document: its name, identity, fingerprint and rows. Knows neither arrays nor models.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnlm.datastore.tables import StoredDocument
from knnlm.errors import DatastoreCorruptError

MANIFEST, DOCUMENTS = "knnlm.json", "documents.jsonl"
_FIELDS = ("name", "identity", "fingerprint", "start", "stop", "tokens", "complete")


def write_manifest(
    folder: Path, description: dict[str, Any], documents: Iterable[StoredDocument]
) -> None:
    """Write both files."""
    text = json.dumps(description, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as file:
        for document in documents:
            fields = asdict(document)
            line = {name: fields[name] for name in _FIELDS}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what knnlm.json says; empty without one. Raises DatastoreCorruptError."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        settings = manifest["settings"]
        texts = [settings[name] for name in ("model", "key", "boundary")]
        numbers = [settings["window"], settings["context"], manifest["first_block"]]
        if {type(text) for text in texts} != {str} or {type(each) for each in numbers} != {int}:
            raise TypeError("a text or a number is something else")
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreCorruptError(
            f'{path} must give the "settings" that an export wrote, but it does not ({error}); '
            "restore it, or remove it and say them with options"
        ) from error
    return dict(manifest)


def read_documents(folder: Path, rows: int) -> list[StoredDocument] | None:
    """Return the documents that an export listed, None without a list.

    Raises DatastoreCorruptError unless they divide all `rows` rows.
    """
    path = folder / DOCUMENTS
    if not path.is_file():
        return None
    documents: list[StoredDocument] = []
    expected = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                document = _document(number, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DatastoreCorruptError(
                    f"{path}, line {number}, must be a document as an export wrote it, but is not "
                    f"({error}); restore the file or remove it"
                ) from error
            if document.start != expected or document.stop < expected:
                raise DatastoreCorruptError(
                    f"{path}, line {number}: document {document.name!r} must begin at row "
                    f"{expected}, but has the rows {document.start} to {document.stop}"
                )
            expected = document.stop
            documents.append(document)
    if expected != rows:
        raise DatastoreCorruptError(
            f"{path} must list the documents of all {rows} rows, but ends at row {expected}; "
            "restore the file or remove it"
        )
    return documents


def cut_documents(rows: int, stops: Sequence[int], name: str) -> list[StoredDocument]:
    """Return documents that end at the given rows, and one for what comes after the last."""
    ends = [stop for stop in stops if stop < rows] + [rows]
    documents, start = [], 0
    for number, stop in enumerate(ends, 1):
        own = name if len(ends) == 1 else f"{name}:{number}"
        documents.append(
            StoredDocument(number, own, own, "", start, stop, stop - start, True, False)
        )
        start = stop
    return documents


def _document(number: int, line: dict[str, Any]) -> StoredDocument:
    name, identity, fingerprint, start, stop, tokens, complete = (line[field] for field in _FIELDS)
    if not all(type(text) is str for text in (name, identity, fingerprint)):
        raise TypeError("name, identity and fingerprint must be texts")
    if not all(type(count) is int for count in (start, stop, tokens)) or type(complete) is not bool:
        raise TypeError("start, stop and tokens must be whole numbers, complete true or false")
    return StoredDocument(
        number, name, identity, fingerprint, start, stop, tokens, complete, forgotten=False
    )
