"""Which stored documents belong to the sources that were read, and which are gone from them.

Knows identities alone: a source's own, "<folder>/<path>" for a file of a folder, "<file>#<row>" for
a row of a file or dataset.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.tables import StoredDocument
from knnlm.datastore.upgrade import NAMED_BY_PATH
from knnlm.errors import InvalidArgumentError
from knnlm.text.documents import Document, Documents, Source
from knnlm.text.paths import path_identity

_ROW = re.compile(r"(.+):(\d+)", re.DOTALL)  # how older versions named the rows of a source


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a build did, in documents.

    moved: stored already under another path, where there is nothing now; only the path was changed.
    removed: forgotten because they are gone from their source. gone: gone too, but still stored;
    `sync` removes them. emptied: folders in which nothing is left; their documents stay even with
    `sync`, because a folder that is not mounted looks the same. set_aside: names of the documents
    that were left out because reading them ended two workers.
    """

    added: int = 0
    replaced: int = 0
    moved: int = 0
    unchanged: int = 0
    removed: int = 0
    gone: int = 0
    emptied: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()


@dataclass(slots=True)
class Gone:
    """Documents that are stored and were not met in their sources, which were read to their ends.

    rows: of sources with rows, which replace themselves. files: of folders and files. emptied:
    folders that had documents and in which none was met; what is gone from them is not listed.
    """

    rows: list[StoredDocument] = field(default_factory=list)
    files: list[StoredDocument] = field(default_factory=list)
    emptied: set[str] = field(default_factory=set)


class Matching:
    """The stored documents that the documents of a build are, by identity and by text.

    met: the identities of the documents that were read. identified: stored documents by identities
    that they get with the next transaction, see `identify`.
    """

    def __init__(self, catalog: Catalog, sources: Iterable[Source]) -> None:
        self.met: set[str] = set()
        self.identified: dict[str, StoredDocument] = {}
        self._catalog = catalog
        self._owners = _Owners(sources)
        self._by_path = _named_by_path(catalog, sources)
        self._moved: set[int] = set()

    def stored(self, identity: str) -> StoredDocument | None:
        """Return the newest document of an identity; older versions' names become identities."""
        if versions := self._catalog.versions(identity):
            return versions[-1]
        if identity in self._by_path:
            self.identified[identity] = self._by_path.pop(identity)
        return self.identified.get(identity)

    def is_moved(self, document: Document, fingerprint: str) -> bool:
        """Look for a stored document with this text whose own file is no longer there."""
        same_text = "fingerprint = ? AND complete AND NOT forgotten"
        for stored in self._catalog.documents(same_text, fingerprint):
            if stored.id not in self._moved and _is_left_behind(stored.identity):
                self._moved.add(stored.id)
                identity = document.identity or document.name
                self.identified[identity] = replace(stored, name=document.name)
                return True
        return False

    def identify(self, identities: Iterable[str]) -> None:
        """Give documents these of the `identified` identities; inside a transaction."""
        for identity in identities:
            if (document := self.identified.pop(identity, None)) is not None:
                self._catalog.identify_document(document.id, document.name, identity)

    def find_gone(self) -> Gone:
        """Return what is gone from the sources, all of whose documents were met."""
        gone, owners = Gone(), self._owners
        stored = {each.id: (each.identity, each) for each in self._catalog.live_documents()}
        stored |= {each.id: (identity, each) for identity, each in self._by_path.items()}
        nonempty = {source for identity in self.met for source in owners.of(identity)}
        for identity, document in stored.values():
            if identity in self.met:
                if document.identity not in self.met:  # of an older version, and stored again since
                    gone.rows.append(document)
                continue
            holders = (each for each in owners.of(identity) if not each.rows or _is_row(identity))
            if (owner := next(holders, None)) is None:
                continue
            if owner.rows:
                gone.rows.append(document)
            elif owner in nonempty:
                gone.files.append(document)
            else:
                gone.emptied.add(owner.identity)
        return gone


def check_sync(documents: Iterable[Document]) -> None:
    """Refuse documents that do not say what is gone; warn of sources that were not read whole."""
    skipped = documents.skipped if isinstance(documents, Documents) else ()
    if not skipped and not (isinstance(documents, Documents) and documents.sources):
        raise InvalidArgumentError(
            "sync needs a file, a folder or an hf: dataset as text source: documents made in "
            "Python and glob patterns do not say which ones are gone"
        )
    if skipped:
        _LOG.warning(
            "sync forgets nothing of the files and folders in which something cannot be read"
        )


class _Owners:
    """The sources that were read, to find those that a document belongs to."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._with_rows, self._others = {}, {}
        for source in sources:
            if source.rows:
                self._with_rows[source.identity] = source
            else:
                self._others[source.identity.rstrip("/")] = source

    def of(self, identity: str) -> Iterator[Source]:
        """Yield the sources that hold a document; for a row its file comes before folders."""
        for separator, owners in (("#", self._with_rows), ("/", self._others)):
            for found in re.finditer(f"{separator}|$", identity) if owners else ():
                if (source := owners.get(identity[: found.start()])) is not None:
                    yield source


def _is_row(identity: str) -> bool:
    """Return whether an identity with "#" is of a row, and not of a file with such a name."""
    return not os.path.isfile(identity)  # noqa: PTH113 (False for what is no name of a file)


def _is_left_behind(identity: str) -> bool:
    """Return whether an identity is of a file that is no longer there, or of a part of such a file.

    A member of an archive counts as there while the archive is.
    """
    ends = (found.start() for found in re.finditer(r"#|(?<=\.zip)/", identity, re.IGNORECASE))
    paths = (identity, *(identity[:end] for end in ends))
    return identity.startswith("/") and not any(map(_is_there, paths))


def _is_there(path: str) -> bool:
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # it cannot be said
        return True
    return True


def _named_by_path(catalog: Catalog, sources: Iterable[Source]) -> dict[str, StoredDocument]:
    """Return the documents that older versions stored under the path that was given.

    By the identities that these paths have now, seen from the current folder.
    """
    last = catalog.get(NAMED_BY_PATH) or 0
    documents = catalog.documents("id <= ? AND identity = name AND NOT forgotten", last)
    with_rows = {source.identity for source in sources if source.rows}
    found: dict[str, StoredDocument] = {}
    for document in sorted(documents, key=lambda document: _row(document)[1]):
        source = _resolved(_row(document)[0])
        identity = _resolved(document.name)
        if source in with_rows:
            identity = first = f"{source}#{document.fingerprint[:16]}"
            copies = 1
            while identity in found:
                copies += 1
                identity = f"{first}-{copies}"
        found[identity] = document
    return found


def _row(document: StoredDocument) -> tuple[str, int]:
    """Return the source and number of a row, as older versions named it."""
    row = _ROW.fullmatch(document.name)
    return (row[1], int(row[2])) if row else (document.name, 0)


def _resolved(path: str) -> str:
    return path if path.startswith("hf:") else path_identity(Path(path))


def find_named(documents: Sequence[StoredDocument], name: str) -> list[StoredDocument]:
    """Return the documents of a name, a path or a pattern. Raises InvalidArgumentError."""
    path = _resolved(name)
    of_path = [document for document in documents if _belongs(document.identity, path)]
    of_name = [document for document in documents if document.name == name]
    if of_path and of_name and of_path != of_name:
        raise InvalidArgumentError(
            f"{name!r} is the name of {of_name[0].identity} and the path of {path}: give the full "
            "path of the one that is meant"
        )
    return of_path or of_name or [d for d in documents if fnmatchcase(d.name, name)]


def _belongs(identity: str, source: str) -> bool:
    """Return whether a document is a source, lies below it, or is a row of it."""
    if identity.startswith(source + "#"):
        return _is_row(identity)
    return identity == source or identity.startswith(source.rstrip("/") + "/")
