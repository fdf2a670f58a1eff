"""Storing documents in a datastore: resumable, with the same result however often it is killed.

Windows are gathered until they fill a shard; the shard's file and its documents become visible in
one transaction. How windows are gathered depends only on what is already committed, so that a
resumed run reads the same batches as an uninterrupted one.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Boundary
from knnlm.datastore.catalog import SHARDS, StoredDocument, StoredShard
from knnlm.datastore.create import open_or_create
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import write_shard
from knnlm.datastore.unfit_keys import measurable, why_unmeasurable
from knnlm.errors import NonFiniteKeysError
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import EncodedDocument, cut_documents, read_keys, total_bytes
from knnlm.progress import SILENT, Advance, Progress
from knnlm.rules import LARGEST, check_whole
from knnlm.text.corpus import Document
from knnlm.text.windows import Window

_MIN_SHARD_ROWS, _MAX_SHARD_BYTES = 8192, 1 << 28


def append_documents(
    path: str | Path,
    lm: LanguageModel,
    documents: Iterable[Document],
    *,
    window: int | None = None,
    context: int | None = None,
    boundary: str | None = None,
    key_dtype: str | None = None,
    max_entries: int | None = None,
    shard_rows: int | None = None,
    progress: Progress = SILENT,
) -> Datastore:
    """Store every token of `documents` with the key that preceded it; leaves the index as it is.

    The arguments and errors are those of `knnlm.build`, which also keeps the index up to date.
    shard_rows: rows committed at once; by default an eighth of the rows stored, at least 8,192.
    An error before the first commit leaves no datastore behind.
    """
    for name, number in [("max_entries", max_entries), ("shard_rows", shard_rows)]:
        if number is not None:
            check_whole(name, number, most=LARGEST)
    store = open_or_create(
        Path(path), lm, window=window, context=context, boundary=boundary, key_dtype=key_dtype
    )
    with store.writer(), _removed_if_empty(store):
        _Appender(store, lm, documents, shard_rows, progress).run(max_entries)
    store.refresh()
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

    id, start: of its record, once it has one. passed: how many of its tokens were stored, or passed
    over at the head of a stream.
    """

    encoded: EncodedDocument
    fingerprint: str
    id: int | None
    start: int
    passed: int


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
        self.incoming: dict[int, _Incoming] = {}
        self.fingerprints: dict[int, str] = {}
        self.in_flight: dict[str, str] = {}
        self.total_bytes = total_bytes(documents)
        self.bytes_read = self.tokens_read = 0  # of the documents before `current`
        self.current: EncodedDocument | None = None

    def run(self, max_entries: int | None) -> None:
        """Store everything that is missing, up to `max_entries` rows in the datastore."""
        with self.progress.task("build", None, "tokens") as advance:
            shard: list[Window] = []
            shard_rows = 0
            windows = cut_documents(
                self.lm,
                self._missing(),
                self.store.windowing,
                on_document=self._begin,
                history=self.history,
            )
            passed_over: Window | None = None
            if self.fresh_stream and self.store.settings.context > 0:
                passed_over = next(windows, None)
                self._pass_over(passed_over)
            # A shard is committed once the next window is known, because only then is it known
            # which documents ended in the shard.
            for window in windows:
                if max_entries is not None and self.rows + shard_rows + window.new > max_entries:
                    break
                if shard_rows >= self._shard_target():
                    self._commit(shard, advance)
                    shard, shard_rows = [], 0
                shard.append(window)
                shard_rows += window.new
            if shard or passed_over:
                self._commit(shard, advance)

    def _shard_target(self) -> int:
        if self.shard_rows is not None:
            return self.shard_rows
        row_bytes = self.store.settings.dimension * self.store.key_dtype.itemsize
        return max(_MIN_SHARD_ROWS, min(self.rows // 8, _MAX_SHARD_BYTES // row_bytes))

    def _missing(self) -> Iterator[Document]:
        """Yield the documents that are not stored in full."""
        number = 0
        for document in self.documents:
            fingerprint = document.fingerprint()
            stored = self.catalog.latest_document(document.name)
            same = stored is not None and stored.fingerprint == fingerprint
            if (stored and same and stored.complete) or (
                self.in_flight.get(document.name) == fingerprint
            ):
                if self.total_bytes is not None:
                    self.total_bytes -= document.size_bytes
                continue
            self.fingerprints[number] = fingerprint
            self.in_flight[document.name] = fingerprint
            number += 1
            yield document

    def _begin(self, encoded: EncodedDocument) -> None:
        """Prepare to store a document; the first one may continue an interrupted run."""
        # documents without text never get here, and count as missing in every run
        fingerprint = self.fingerprints.pop(encoded.number)
        stored = None
        if self.current is None:
            stored = self._unfinished(encoded.name, fingerprint)
        else:
            self.bytes_read += self.current.size_bytes
            self.tokens_read += self.current.tokens
        incoming = _Incoming(encoded, fingerprint, None, 0, 0)
        if stored is not None:
            incoming.id, incoming.start, incoming.passed = stored.id, stored.start, stored.tokens
            encoded.skip = stored.tokens
        elif self.fresh_stream and self.current is None:
            incoming.passed = 1  # a stream's first token is read, never predicted
        self.incoming[encoded.number] = incoming
        self.current = encoded

    def _unfinished(self, name: str, fingerprint: str) -> StoredDocument | None:
        """Return the record of a document that the last run was storing when it ended."""
        stored = self.catalog.latest_document(name)
        if stored and stored.fingerprint == fingerprint and stored.stop == self.rows:
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
        starts = np.cumsum([0] + [window.new for window in windows]).tolist()
        settings = self.store.settings
        keys = torch.empty(starts[-1], settings.dimension, dtype=self.store.key_dtype)
        for number, window_keys in read_keys(self.lm, windows):
            stored = window_keys.to(self.store.key_dtype)
            if not bool(measurable(stored).all()):
                self._refuse(windows[number], window_keys)
            keys[starts[number] : starts[number + 1]] = stored
            advance(windows[number].new, self._estimated_tokens())
        return keys

    def _refuse(self, window: Window, keys: Float[Tensor, "new dim"]) -> None:
        name = self.incoming[window.spans[0].document].encoded.name
        if bool(measurable(keys).all()):
            largest = float(keys.abs().max())
            raise NonFiniteKeysError(
                f"key_dtype {self.store.settings.key_dtype} cannot hold a key of {name} (largest "
                f"magnitude {largest:.4g}); build another datastore with key_dtype bfloat16"
            )
        raise NonFiniteKeysError(
            f"a key of {name} is {why_unmeasurable(keys)}: {self.lm.name} in {self.lm.dtype} "
            "overflows there; load it in float32 or leave the document out"
        )

    def _commit(self, windows: list[Window], advance: Advance) -> None:
        """Write a shard and make it visible together with its documents."""
        catalog = self.catalog
        file = None
        if windows:
            keys = self._read(windows, advance)
            values = torch.from_numpy(np.concatenate([window.targets for window in windows]))
            name = catalog.next_shard_name()
            file = write_shard(self.store.path / SHARDS, name, keys, values)
        start = self.rows
        with catalog.transaction():
            if file is not None:
                catalog.add_shard(StoredShard(start, file))
            for window in windows:
                for span in window.spans:
                    document = self.incoming[span.document]
                    if document.id is None:
                        self._add(document)
                    document.passed += span.count
                    self.rows += span.count
                    self._extend(document)
                self._remember(window)
            for document in self.incoming.values():
                if document.id is None and document.passed:  # all its tokens were passed over
                    self._add(document)
                    self._extend(document)
            if self.streaming:
                catalog.set("stream_tail", self.history.tolist())
        completed = [number for number, document in self.incoming.items() if _is_complete(document)]
        for number in completed:
            self.in_flight.pop(self.incoming.pop(number).encoded.name, None)

    def _add(self, document: _Incoming) -> None:
        name = document.encoded.name
        document.start = self.rows
        document.id = self.catalog.add_document(name, document.fingerprint, self.rows)

    def _extend(self, document: _Incoming) -> None:
        assert document.id is not None
        complete = _is_complete(document)
        self.catalog.extend_document(document.id, self.rows, document.passed, complete)
        if complete:  # in the same transaction it replaces its older versions
            name = document.encoded.name
            for older in self.catalog.documents(
                "name = ? AND id < ? AND NOT forgotten", name, document.id
            ):
                self.catalog.forget_document(older.id)


def _is_complete(document: _Incoming) -> bool:
    return document.encoded.exhausted and document.passed == document.encoded.tokens
