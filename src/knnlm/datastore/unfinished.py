"""An index that was begun and is not finished: the folder of its files, and what it is of.

A long build keeps what it has done, so that it goes on after it was killed. Its manifest says of
which state of the datastore that is; when the entries change, it holds keys that may be gone, and
no longer belongs. Knows no kind of index.
"""

import json
from pathlib import Path
from typing import Any

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import ASIDE, publish, writing
from knnlm.datastore.stored_index import FOLDER

_MANIFEST = "manifest.json"


def unfinished_folder(folder: Path) -> Path:
    """Return the folder, in that of a datastore, of an index that is not finished."""
    return folder / FOLDER / "unfinished"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what a datastore's unfinished index is of; None where there is none to go on with."""
    try:
        manifest = json.loads((unfinished_folder(folder) / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Record durably what an unfinished index is of, and how far it is.

    manifest: holds the `entries_state`. Raises DatastoreWriteError.
    """
    path = unfinished_folder(folder) / _MANIFEST
    aside = path.with_name(path.name + ASIDE)
    with writing(path.parent):
        aside.write_text(json.dumps(manifest), encoding="ascii")
        publish(aside, path)


def is_current(manifest: dict[str, Any] | None, catalog: Catalog) -> bool:
    """Return whether there is an unfinished index, of the entries that are stored now."""
    return manifest is not None and entries_state(catalog).items() <= manifest.items()


def entries_state(catalog: Catalog) -> dict[str, int]:
    """Return what tells the entries that are stored now from all others."""
    return {"generation": catalog.generation, "numbering": catalog.numbering}


def discard_unfinished(folder: Path) -> None:
    """Delete a datastore's unfinished index, its manifest first. Raises DatastoreWriteError."""
    begun = unfinished_folder(folder)
    if begun.is_dir():
        with writing(begun):
            (begun / _MANIFEST).unlink(missing_ok=True)
            for path in begun.iterdir():
                path.unlink()
            begun.rmdir()
