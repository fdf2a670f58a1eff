"""Documents → the units that become shards, in order: what is missing, and how it is grouped.

How windows are grouped depends only on the rows before them, so that a resumed build plans the same
units as an uninterrupted one. Knows the catalog, which it only reads, and no keys.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from knnlm.choices import Boundary
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shard_making import Unit
from knnlm.datastore.sources import Changes, Matching
from knnlm.datastore.tables import StoredDocument
from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import EncodedDocument, cut_documents, total_bytes
from knnlm.text.documents import Document, Documents
from knnlm.text.windows import Window

_Item = TypeVar("_Item")
_MIN_SHARD_ROWS, _MAX_SHARD_BYTES = 8192, 1 << 28


@dataclass(slots=True)
class Incoming:
    """A document that is being stored.

    name: as the source gives it. id, start: of its record, once it has one. passed: how many of its
    tokens were stored, or passed over at the head of a stream.
    """

    name: str
    identity: str
    fingerprint: str
    encoded: EncodedDocument | None = None
    id: int | None = None
    start: int = 0
    passed: int = 0

    @property
    def is_complete(self) -> bool:
        """Whether the document's last token was stored."""
        encoded = self.encoded
        return encoded is not None and encoded.exhausted and self.passed == encoded.tokens


@dataclass(slots=True)
class Tally:
    """What a build has done so far, also where it had to plan again.

    last_document: the id of the last one that was stored before. first_row: of the build. moved:
    identities. set_aside: names by identity.
    """

    last_document: int
    first_row: int
    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    moved: set[str] = field(default_factory=set)
    set_aside: dict[str, str] = field(default_factory=dict)

    def changes(self) -> Changes:
        """Return the counts."""
        return Changes(
            self.added,
            self.replaced,
            len(self.moved),
            self.unchanged,
            set_aside=tuple(self.set_aside.values()),
        )


class ShardPlan:
    """The units of everything that a datastore lacks; used once.

    incoming: documents that are tokenized and not yet stored whole, by number; `finish_complete`
    takes them out. rows: those planned. all_met: whether all documents were met. stopped: whether
    the plan ended at `max_entries`. unreadable: the error of a text that cannot be read, where the
    plan ended.
    """

    def __init__(
        self,
        store: Datastore,
        lm: LanguageModel,
        documents: Iterable[Document],
        shard_rows: int | None,
        tally: Tally,
    ) -> None:
        self.incoming: dict[int, Incoming] = {}
        self.rows = store.rows
        self.all_met = self.stopped = False
        self.unreadable: InvalidTextError | None = None
        sources = documents.sources if isinstance(documents, Documents) else ()
        self.known = Matching(store.catalog, sources)
        self.history = np.array(store.catalog.get("stream_tail") or [], dtype=np.int32)
        self._store = store
        self._lm = lm
        self._documents = documents
        self._shard_rows = shard_rows
        self._tally = tally
        streaming = store.settings.boundary == Boundary.stream
        self._fresh_stream = streaming and len(self.history) == 0
        self._arriving: dict[int, Incoming] = {}  # its text is not tokenized yet
        self._in_flight: dict[str, str] = {}  # the fingerprints of both, by identity
        self._skipped = self._skipped_now()
        self._total_bytes = total_bytes(documents)
        self._bytes_read = self._tokens_read = 0  # of the documents before `current`
        self._current: EncodedDocument | None = None

    def units(self, max_entries: int | None) -> Iterator[Unit]:
        """Yield the units, up to `max_entries` rows in the datastore.

        A unit is yielded once the next window is known, because only then is it known which
        documents end in it.
        """
        windows = self._until_unreadable(
            cut_documents(
                self._lm,
                self._until_unreadable(self._missing()),
                self._store.windowing,
                on_document=self._begin,
                history=self.history,
            )
        )
        passed_over = None
        if self._fresh_stream and self._store.settings.context > 0:
            passed_over = next(windows, None)
        shard: list[Window] = []
        start = self.rows
        for window in windows:
            if max_entries is not None and self.rows + window.rows > max_entries:
                self.stopped = True
                break
            if self.rows - start >= self._shard_target(start):
                yield self._unit(shard, passed_over)
                shard, start, passed_over = [], self.rows, None
            shard.append(window)
            self.rows += window.rows
        if shard or passed_over:
            yield self._unit(shard, passed_over)

    def _unit(self, shard: list[Window], passed_over: Window | None) -> Unit:
        numbers = {span.document for window in shard for span in window.spans}
        return Unit(
            shard,
            {number: self.incoming[number].name for number in numbers},
            passed_over,
            tuple(self.known.identified),
            self._expected_tokens(),
        )

    def finish_complete(self) -> None:
        """Take out the documents that are stored whole."""
        for number in [number for number, each in self.incoming.items() if each.is_complete]:
            self._in_flight.pop(self.incoming.pop(number).identity, None)

    def unread(self) -> set[str]:
        """Return the identities of documents that were met and have no text."""
        unread = [*self._arriving.values(), *self.incoming.values()]
        return {document.identity for document in unread if document.id is None}

    def _until_unreadable(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield documents or windows up to a text that cannot be read, as if all text ended there.

        The documents are tokenized ahead of the windows: the first to end keeps what is whole.
        """
        try:
            yield from items
        except InvalidTextError as error:
            self.unreadable = error

    def _shard_target(self, rows: int) -> int:
        """Return how many rows the shard after so many has at least."""
        if self._shard_rows is not None:
            return self._shard_rows
        row_bytes = self._store.settings.dimension * self._store.key_dtype.itemsize
        return max(_MIN_SHARD_ROWS, min(rows // 8, _MAX_SHARD_BYTES // row_bytes))

    def _missing(self) -> Iterator[Document]:
        """Yield the documents that are not stored in full."""
        number = 0
        for document in self._documents:
            identity = document.identity or document.name
            fingerprint = document.fingerprint()
            stored = self.known.stored(identity)
            if again := identity in self.known.met:
                self._check_same(identity, fingerprint, stored)
            self.known.met.add(identity)
            same = stored is not None and stored.fingerprint == fingerprint and stored.complete
            moved = stored is None and not again and self.known.is_moved(document, fingerprint)
            if moved:
                self._tally.moved.add(identity)
            if again or same or moved or identity in self._tally.set_aside:
                if same and not again and stored is not None:
                    self._tally.unchanged += self._was_there(stored)
                if self._total_bytes is not None:
                    self._total_bytes -= document.size_bytes
                continue
            self._arriving[number] = Incoming(document.name, identity, fingerprint)
            self._in_flight[identity] = fingerprint
            number += 1
            yield document
        # what is skipped while it is read may be there still
        self.all_met = self._skipped == self._skipped_now()

    def _was_there(self, stored: StoredDocument) -> bool:
        """Whether a document was stored before this build, under the same path."""
        return stored.id <= self._tally.last_document and stored.identity not in self._tally.moved

    def _skipped_now(self) -> int:
        return len(self._documents.skipped) if isinstance(self._documents, Documents) else 0

    def _check_same(self, identity: str, fingerprint: str, stored: StoredDocument | None) -> None:
        """Refuse another text of a document that was met before, which would replace the first."""
        known = self._in_flight.get(identity) or (stored and stored.fingerprint)
        if known != fingerprint:
            raise InvalidArgumentError(
                f"documents must be told apart, but two texts are both {identity}: give each a "
                "name (or a value of the id column) of its own"
            )

    def _begin(self, encoded: EncodedDocument) -> None:
        """Prepare to store a document; the first one may continue an interrupted run."""
        incoming = self._arriving.pop(encoded.number)  # documents without text never get here
        incoming.encoded = encoded
        stored = None
        if self._current is None:
            stored = self._unfinished(incoming)
        else:
            self._bytes_read += self._current.size_bytes
            self._tokens_read += self._current.tokens
        if stored is not None:
            incoming.id, incoming.start, incoming.passed = stored.id, stored.start, stored.tokens
            encoded.skip = stored.tokens
        elif self._fresh_stream and self._current is None:
            incoming.passed = 1  # a stream's first token is read, never predicted
        self.incoming[encoded.number] = incoming
        self._current = encoded

    def _unfinished(self, incoming: Incoming) -> StoredDocument | None:
        """Return the record of a document that the last run was storing when it ended."""
        stored = self.known.stored(incoming.identity)
        if stored and stored.fingerprint == incoming.fingerprint and stored.stop == self.rows:
            return stored
        return None

    def _expected_tokens(self) -> float | None:
        """Estimate the tokens of all documents from those read."""
        assert self._current is not None
        size_bytes = self._bytes_read + self._current.size_bytes
        if self._total_bytes is None or not size_bytes:
            return None
        tokens = (self._tokens_read + self._current.tokens) * self._total_bytes / size_bytes
        return self._store.rows - self._tally.first_row + tokens
