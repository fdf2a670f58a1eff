"""Storing documents in a datastore: resumable, with the same result however often it is killed.

Windows are gathered until they fill a shard; the shard's file and its documents become visible in
one transaction. How windows are gathered depends only on what is already committed, so that a
resumed run reads the same batches as an uninterrupted one.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Boundary
from knnlm.datastore.catalog import SHARDS, StoredShard
from knnlm.datastore.create import open_or_create
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import write_shard
from knnlm.datastore.sources import Changes, Matching, check_sync
from knnlm.datastore.tables import StoredDocument
from knnlm.datastore.unfit_keys import measurable, unfit_new_key
from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import EncodedDocument, cut_documents, read_keys, total_bytes
from knnlm.progress import SILENT, Advance, Progress
from knnlm.rules import LARGEST, check_whole
from knnlm.text.documents import Document, Documents
from knnlm.text.windows import Window

_Item = TypeVar("_Item")
_MIN_SHARD_ROWS, _MAX_SHARD_BYTES = 8192, 1 << 28


def append_documents(
    path: str | Path,
    lm: LanguageModel,
    documents: Iterable[Document],
    *,
    window: int | None = None,
    context: int | None = None,
    boundary: str | None = None,
    control_tokens: bool | None = None,
    key_dtype: str | None = None,
    max_entries: int | None = None,
    shard_rows: int | None = None,
    sync: bool = False,
    progress: Progress = SILENT,
) -> Datastore:
    """Store every token of `documents` with the key that preceded it; leaves the index as it is.

    The arguments and errors are those of `knnlm.build`, which also keeps the index up to date.
    shard_rows: rows committed at once; by default an eighth of the rows stored, at least 8,192.
    An error before the first commit leaves no datastore behind. At a text that cannot be read, the
    whole documents before it are stored, and then InvalidTextError is raised.
    """
    for name, number in [("max_entries", max_entries), ("shard_rows", shard_rows)]:
        if number is not None:
            check_whole(name, number, most=LARGEST)
    if sync:
        check_sync(documents)
    store = open_or_create(
        Path(path),
        lm,
        window=window,
        context=context,
        boundary=boundary,
        control_tokens=control_tokens,
        key_dtype=key_dtype,
    )
    with store.writer(), _removed_if_empty(store):
        appender = _Appender(store, lm, documents, shard_rows, progress)
        changes = appender.run(max_entries, sync)
        if appender.unreadable is not None:
            raise InvalidTextError(
                f"{appender.unreadable}; what came before it is stored, the rest is left out"
            ) from appender.unreadable
    store.refresh()
    store.changes = changes
    return store


@contextmanager
def _removed_if_empty(store: Datastore) -> Iterator[None]:
    """If an error comes before anything was ever committed to a datastore, remove its folder."""
    try:
        yield
    except BaseException:
        if store.generation == 0 and not store.refresh():
            store.close()
            shutil.rmtree(store.path)
        raise


@dataclass(slots=True)
class _Incoming:
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


class _Appender:
    """Reads the documents that a datastore lacks and commits them shard by shard."""

    def __init__(
        self,
        store: Datastore,
        lm: LanguageModel,
        documents: Iterable[Document],
        shard_rows: int | None,
        progress: Progress,
    ) -> None:
        self.store = store
        self.catalog = store.catalog
        self.lm = lm
        self.documents = documents
        self.shard_rows = shard_rows
        self.progress = progress
        self.rows = store.rows
        self.streaming = store.settings.boundary == Boundary.stream
        self.history = np.array(self.catalog.get("stream_tail") or [], dtype=np.int32)
        self.fresh_stream = self.streaming and len(self.history) == 0
        sources = documents.sources if isinstance(documents, Documents) else ()
        self.known = Matching(store.catalog, sources)
        self.arriving: dict[int, _Incoming] = {}  # its text is not tokenized yet
        self.incoming: dict[int, _Incoming] = {}
        self.in_flight: dict[str, str] = {}  # the fingerprints of both, by identity
        self.all_met = False
        self.skipped = self._skipped_now()
        self.added = self.replaced = self.moved = self.unchanged = 0
        self.total_bytes = total_bytes(documents)
        self.bytes_read = self.tokens_read = 0  # of the documents before `current`
        self.current: EncodedDocument | None = None
        self.unreadable: InvalidTextError | None = None

    def run(self, max_entries: int | None, sync: bool) -> Changes:
        """Store everything that is missing, up to `max_entries` rows in the datastore.

        Then, unless these stopped it, take out what is gone from its source.
        """
        stopped = False
        with self.progress.task("build", None, "tokens") as advance:
            shard: list[Window] = []
            shard_rows = 0
            windows = self._until_unreadable(
                cut_documents(
                    self.lm,
                    self._until_unreadable(self._missing()),
                    self.store.windowing,
                    on_document=self._begin,
                    history=self.history,
                )
            )
            passed_over: Window | None = None
            if self.fresh_stream and self.store.settings.context > 0:
                passed_over = next(windows, None)
                self._pass_over(passed_over)
            # A shard is committed once the next window is known, because only then is it known
            # which documents ended in the shard.
            for window in windows:
                if max_entries is not None and self.rows + shard_rows + window.rows > max_entries:
                    stopped = True
                    break
                if shard_rows >= self._shard_target():
                    self._commit(shard, advance)
                    shard, shard_rows = [], 0
                shard.append(window)
                shard_rows += window.rows
            if shard or passed_over:
                self._commit(shard, advance)
            if self.unreadable is not None:
                self._forget_incomplete()
        return self._finish(all_read=self.all_met and not stopped, sync=sync)

    def _until_unreadable(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield documents or windows up to a text that cannot be read, as if all text ended there.

        The documents are tokenized ahead of the windows: the first to end keeps what is whole.
        """
        try:
            yield from items
        except InvalidTextError as error:
            self.unreadable = error

    def _forget_incomplete(self) -> None:
        """Forget the document that broke off in the middle: it may never be right again."""
        broken = [each.id for each in self.incoming.values() if each.id is not None]
        if broken:
            with self.catalog.transaction():
                for number in broken:
                    self.catalog.forget_document(number)

    def _shard_target(self) -> int:
        if self.shard_rows is not None:
            return self.shard_rows
        row_bytes = self.store.settings.dimension * self.store.key_dtype.itemsize
        return max(_MIN_SHARD_ROWS, min(self.rows // 8, _MAX_SHARD_BYTES // row_bytes))

    def _missing(self) -> Iterator[Document]:
        """Yield the documents that are not stored in full."""
        number = 0
        for document in self.documents:
            identity = document.identity or document.name
            fingerprint = document.fingerprint()
            stored = self.known.stored(identity)
            if again := identity in self.known.met:
                self._check_same(identity, fingerprint, stored)
            self.known.met.add(identity)
            same = stored is not None and stored.fingerprint == fingerprint and stored.complete
            moved = stored is None and not again and self.known.is_moved(document, fingerprint)
            if again or same or moved:
                self.unchanged += same and not again
                self.moved += moved
                if self.total_bytes is not None:
                    self.total_bytes -= document.size_bytes
                continue
            self.arriving[number] = _Incoming(document.name, identity, fingerprint)
            self.in_flight[identity] = fingerprint
            number += 1
            yield document
        # what is skipped while it is read may be there still
        self.all_met = self.skipped == self._skipped_now()

    def _skipped_now(self) -> int:
        return len(self.documents.skipped) if isinstance(self.documents, Documents) else 0

    def _check_same(self, identity: str, fingerprint: str, stored: StoredDocument | None) -> None:
        """Refuse another text of a document that was met before, which would replace the first."""
        known = self.in_flight.get(identity) or (stored and stored.fingerprint)
        if known != fingerprint:
            raise InvalidArgumentError(
                f"documents must be told apart, but two texts are both {identity}: give each a "
                "name (or a value of the id column) of its own"
            )

    def _begin(self, encoded: EncodedDocument) -> None:
        """Prepare to store a document; the first one may continue an interrupted run."""
        incoming = self.arriving.pop(encoded.number)  # documents without text never get here
        incoming.encoded = encoded
        stored = None
        if self.current is None:
            stored = self._unfinished(incoming)
        else:
            self.bytes_read += self.current.size_bytes
            self.tokens_read += self.current.tokens
        if stored is not None:
            incoming.id, incoming.start, incoming.passed = stored.id, stored.start, stored.tokens
            encoded.skip = stored.tokens
        elif self.fresh_stream and self.current is None:
            incoming.passed = 1  # a stream's first token is read, never predicted
        self.incoming[encoded.number] = incoming
        self.current = encoded

    def _unfinished(self, incoming: _Incoming) -> StoredDocument | None:
        """Return the record of a document that the last run was storing when it ended."""
        stored = self.known.stored(incoming.identity)
        if stored and stored.fingerprint == incoming.fingerprint and stored.stop == self.rows:
            return stored
        return None

    def _estimated_tokens(self) -> float | None:
        assert self.current is not None
        size_bytes = self.bytes_read + self.current.size_bytes
        if self.total_bytes is None or not size_bytes:
            return None
        return (self.tokens_read + self.current.tokens) * self.total_bytes / size_bytes

    def _pass_over(self, window: Window | None) -> None:
        if window is not None:
            for span in window.spans:
                self.incoming[span.document].passed += span.count
            self._remember(window)

    def _remember(self, window: Window) -> None:
        if self.streaming:
            tokens = np.concatenate([self.history, window.tokens[1 + window.context :]])
            if len(self.history) == 0:
                tokens = window.tokens
            self.history = tokens[-(self.store.settings.context + 1) :]

    def _read(self, windows: list[Window], advance: Advance) -> Float[Tensor, "rows dim"]:
        """Return the keys of the windows' new positions, in order, in the dtype on disk."""
        starts = np.cumsum([0] + [window.rows for window in windows]).tolist()
        settings = self.store.settings
        keys = torch.empty(starts[-1], settings.dimension, dtype=self.store.key_dtype)
        for number, window_keys in read_keys(self.lm, windows):
            chosen = windows[number].stored
            if chosen is not None:
                window_keys = window_keys[torch.from_numpy(chosen)]
            stored = window_keys.to(self.store.key_dtype)
            if not bool(measurable(stored).all()):
                name = self.incoming[windows[number].spans[0].document].name
                raise unfit_new_key(name, window_keys, self.store.settings.key_dtype, self.lm)
            keys[starts[number] : starts[number + 1]] = stored
            advance(windows[number].new, self._estimated_tokens())
        return keys

    def _commit(self, windows: list[Window], advance: Advance) -> None:
        """Write a shard and make it visible together with its documents."""
        catalog = self.catalog
        file = None
        with_rows = [window for window in windows if window.rows]
        if with_rows:
            keys = self._read(with_rows, advance)
            values = torch.from_numpy(np.concatenate([window.values for window in with_rows]))
            name = catalog.next_shard_name()
            file = write_shard(self.store.path / SHARDS, name, keys, values)
        start = self.rows
        with catalog.transaction():
            self.known.identify()
            if file is not None:
                catalog.add_shard(StoredShard(start, file))
            for window in windows:
                for span in window.spans:
                    document = self.incoming[span.document]
                    if document.id is None:
                        self._add(document)
                    document.passed += span.count
                    # what is stored in part has windows of its own
                    self.rows += span.count if window.stored is None else window.rows
                    self._extend(document)
                self._remember(window)
            for document in self.incoming.values():
                if document.id is None and document.passed:  # all its tokens were passed over
                    self._add(document)
                    self._extend(document)
            if self.streaming:
                catalog.set("stream_tail", self.history.tolist())
        completed = [number for number, document in self.incoming.items() if document.is_complete]
        for number in completed:
            self.in_flight.pop(self.incoming.pop(number).identity, None)

    def _add(self, document: _Incoming) -> None:
        document.start = self.rows
        document.id = self.catalog.add_document(
            document.name, document.identity, document.fingerprint, self.rows
        )

    def _extend(self, document: _Incoming) -> None:
        assert document.id is not None
        complete = document.is_complete
        self.catalog.extend_document(document.id, self.rows, document.passed, complete)
        if complete:  # in the same transaction it replaces its older versions
            older = self.catalog.versions(document.identity)[:-1]
            for version in older:
                self.catalog.forget_document(version.id)
            self.replaced += bool(older)
            self.added += not older

    def _finish(self, all_read: bool, sync: bool) -> Changes:
        """Forget what is gone, in one transaction, if all sources were read to their ends."""
        if self.known.identified:
            with self.catalog.transaction():
                self.known.identify()
        changes = Changes(self.added, self.replaced, self.moved, self.unchanged)
        if not all_read:
            return changes
        # a text that has become empty replaces the older one by nothing
        unread = [*self.arriving.values(), *self.incoming.values()]
        empty = {document.identity for document in unread if document.id is None}
        gone = self.known.find_gone()
        removed = gone.rows + (gone.files if sync else [])
        removed += [d for identity in empty for d in self.catalog.versions(identity)]
        if removed:
            with self.catalog.transaction():
                for document in removed:
                    self.catalog.forget_document(document.id)
        return replace(
            changes,
            removed=len({document.identity for document in removed}),
            gone=0 if sync else len({document.identity for document in gone.files}),
            emptied=tuple(sorted(gone.emptied)),
        )
