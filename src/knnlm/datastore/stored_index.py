"""What the catalog records of an index: its kind, what was measured of it, and its files.

The index itself is another layer's; here its files are known by name, rows, size and checksum, so
that one commit makes them visible and one owner knows which files belong.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from knnlm.choices import IndexKind
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import sha256_of

SETTING = "index"
FOLDER = "index"
"""The folder, beside the catalog, of the index's files."""


@dataclass(frozen=True, slots=True)
class IndexFile:
    """A file of an index, which holds the rows first … stop − 1.

    name: relative to the datastore's folder.
    """

    name: str
    first: int
    stop: int
    size_bytes: int
    sha256: str

    @classmethod
    def written(cls, folder: Path, name: str, first: int, stop: int) -> "IndexFile":
        """Return the record of a file that was just written below a datastore's folder."""
        path = folder / name
        return cls(name, first, stop, path.stat().st_size, sha256_of(path))


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """A datastore's index.

    kind: which was built. asked: which was asked for, perhaps "auto". factory: FAISS's. report: the
    facts about it, as in `IndexReport`, with the numbering, generation and rows that it is of; None
    where nothing is built, and all search is exact. files: the first holds the index as built, the
    others the rows appended since, ascending and without gaps. memory: what building it again may
    use, in bytes, as it was asked for.
    """

    kind: str = IndexKind.exact
    asked: str = IndexKind.auto
    factory: str | None = None
    report: dict[str, Any] | None = None
    files: tuple[IndexFile, ...] = ()
    memory: int | None = None

    @property
    def numbering(self) -> int | None:
        """The numbering of the rows that the index is of, None without one."""
        return None if self.report is None else int(self.report["numbering"])

    def dropped(self) -> "StoredIndex":
        """Return the record without what was built, to be built again as before."""
        return replace(self, report=None, files=())


def unused_name(folder: Path, name: str) -> str:
    """Return a name below a folder that no file has: the given one, or one with a number."""
    given = Path(name)
    number = 1
    while (folder / name).exists():
        number += 1
        name = str(given.with_stem(f"{given.stem}-{number}"))
    return name


def stored_index(catalog: Catalog) -> StoredIndex:
    """Read what the catalog records now. Raises DatastoreCorruptError."""
    plain = catalog.get(SETTING)
    if plain is None:
        return StoredIndex()
    files = tuple(IndexFile(**file) for file in plain["files"])
    return StoredIndex(**plain | {"files": files})


def store_index(catalog: Catalog, index: StoredIndex) -> None:
    """Record an index; inside a transaction."""
    catalog.set(SETTING, asdict(index))
