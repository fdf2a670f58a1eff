"""Corpus + language model → datastore: resumable, and equal however often it was killed.

Windows are gathered until they fill a shard; the shard's file and its documents become visible in
one transaction. How windows are gathered depends only on what is already committed, so that a
resumed build reads the same batches as an uninterrupted one.
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

from knnlm.choices import Boundary, KeyDtype, parse_choice
from knnlm.datastore.catalog import FILE_NAME, Catalog, Settings, StoredDocument, StoredShard
from knnlm.datastore.datastore import LOCK_NAME, SHARDS, Datastore, writer_lock
from knnlm.datastore.shards import ASIDE, write_shard, writing
from knnlm.errors import (
    DatastoreMismatchError,
    DatastoreWriteError,
    InvalidArgumentError,
    NonFiniteKeysError,
)
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import (
    EncodedDocument,
    Windowing,
    choose_windowing,
    cut_windows,
    default_batch_tokens,
    encode_documents,
    read_keys,
    total_bytes,
)
from knnlm.progress import SILENT, Advance, Progress
from knnlm.text.corpus import Document
from knnlm.text.windows import Window

_MIN_SHARD_ROWS, _MAX_SHARD_BYTES = 8192, 1 << 28


def build(
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
    batch_tokens: int | None = None,
    progress: Progress = SILENT,
) -> Datastore:
    """Store every token of `documents` with the key that preceded it; make, resume or extend.

    A document that is already stored with the same text is passed over, one whose text changed
    takes the place of its old version, and a build that was killed goes on after its last
    committed shard.

    path: the datastore's folder; made if it is not there.
    window, context, boundary: see `Windowing`; by default 1,024 positions (or all the model has),
        256 of them context, "document"; for an existing datastore, its own.
    key_dtype: of the keys on disk, "float16" (default), "bfloat16" or "float32".
    max_entries: stop at the last whole window with which the datastore has at most so many rows.
    shard_rows: rows committed at once; by default an eighth of what is stored, at least 8,192.
    batch_tokens: positions that the model reads at once.

    With boundary "stream" and context > 0 the first block, which has no context, is read but not
    stored (Khandelwal et al. 2020's code). Raises InvalidArgumentError, DatastoreMismatchError,
    DatastoreLockedError, DatastoreWriteError, NonFiniteKeysError and the corpus's own errors; an
    error before the first commit leaves no datastore behind.
    """
    path = Path(path)
    for name, number in [
        ("max_entries", max_entries),
        ("shard_rows", shard_rows),
        ("batch_tokens", batch_tokens),
    ]:
        if number is not None and number < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, got {number}")
    if (path / FILE_NAME).exists():
        store = Datastore(path)
        _check_same(store, window, context, boundary, key_dtype)
        store.check_model(lm)
        store.windowing.check_model(lm)
    else:
        windowing = choose_windowing(lm, window, context, boundary)
        settings = _new_settings(lm, windowing, key_dtype or KeyDtype.float16)
        store = _create(path, settings)
    with store.writer() as catalog, _removed_if_empty(store):
        _Builder(store, catalog, lm, documents, shard_rows, batch_tokens, progress).run(max_entries)
    store.refresh()
    return store


def _new_settings(lm: LanguageModel, windowing: Windowing, dtype: str) -> Settings:
    parse_choice(KeyDtype, "key_dtype", dtype)
    return Settings(
        model=lm.name,
        revision=lm.revision,
        model_dtype=str(lm.dtype).removeprefix("torch."),
        weights_fingerprint=lm.weights_fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        vocab_size=lm.vocab_size,
        start_token=lm.start_token,
        key=lm.key,
        dimension=lm.dimension,
        key_dtype=dtype,
        window=windowing.window,
        context=windowing.context,
        boundary=windowing.boundary,
    )


def _check_same(
    store: Datastore,
    window: int | None,
    context: int | None,
    boundary: str | None,
    key_dtype: str | None,
) -> None:
    settings = store.settings
    for name, asked, stored in [
        ("window", window, settings.window),
        ("context", context, settings.context),
        ("boundary", boundary, settings.boundary),
        ("key_dtype", key_dtype, settings.key_dtype),
    ]:
        if asked is not None and asked != stored:
            raise DatastoreMismatchError(
                f"{store.path} was built with {name} {stored}, not {asked}; leave {name} out or "
                "build another datastore"
            )


def _create(path: Path, settings: Settings) -> Datastore:
    ours = {SHARDS, LOCK_NAME, FILE_NAME + ASIDE}
    made = not path.exists()
    with writing(path):
        if path.exists() and not path.is_dir():
            raise InvalidArgumentError(f"{path} is a file, not a folder; name a new folder")
        if path.exists() and not {entry.name for entry in path.iterdir()} <= ours:
            raise InvalidArgumentError(
                f"{path} is a folder with other files in it, not a datastore; name a new folder"
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / SHARDS).mkdir(exist_ok=True)
    with writer_lock(path):
        try:
            if not (path / FILE_NAME).exists():
                Catalog.create(path, settings)
        except DatastoreWriteError:
            if made:
                shutil.rmtree(path)
            raise
    return Datastore(path)


@contextmanager
def _removed_if_empty(store: Datastore) -> Iterator[None]:
    """Leave no datastore behind where nothing was ever committed to it."""
    try:
        yield
    except BaseException:
        if store.generation == 0 and not store.refresh():
            store.close()
            shutil.rmtree(store.path)
        raise


@dataclass(slots=True)
class _Incoming:
    """A document on its way to the disk.

    id, start: of its record, once it has one. passed: how many of its tokens are behind us.
    """

    encoded: EncodedDocument
    fingerprint: str
    id: int | None
    start: int
    passed: int


class _Builder:
    def __init__(
        self,
        store: Datastore,
        catalog: Catalog,
        lm: LanguageModel,
        documents: Iterable[Document],
        shard_rows: int | None,
        batch_tokens: int | None,
        progress: Progress,
    ) -> None:
        self.store = store
        self.catalog = catalog
        self.lm = lm
        self.documents = documents
        self.shard_rows = shard_rows
        self.batch_tokens = batch_tokens or default_batch_tokens(lm)
        self.progress = progress
        self.rows = store.rows
        self.streaming = store.settings.boundary == Boundary.stream
        self.history = np.array(catalog.get("stream_tail") or [], dtype=np.int32)
        self.fresh_stream = self.streaming and len(self.history) == 0
        self.incoming: dict[int, _Incoming] = {}
        self.fingerprints: dict[int, str] = {}
        self.in_flight: dict[str, str] = {}
        self.unfinished: StoredDocument | None = None
        self.total_bytes = total_bytes(documents)
        self.bytes_read = self.tokens_read = 0

    def run(self, max_entries: int | None) -> None:
        """Read everything that is not stored yet and commit it shard by shard."""
        with self.progress.task("build", None, "tokens") as advance:
            shard: list[Window] = []
            shard_rows = 0
            windows = self._windows()
            passed_over: Window | None = None
            if self.fresh_stream and self.store.settings.context > 0:
                passed_over = next(windows, None)
                self._pass_over(passed_over)
            # a shard is committed when the window after it is known: by then it is also known
            # which documents ended in it
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
        """Yield the documents that are not stored whole."""
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

    def _encoded(self) -> Iterator[EncodedDocument]:
        # documents without text come before it unseen, and are missing every time
        first = True
        for encoded in encode_documents(self.lm, self._missing(), self.store.settings.boundary):
            if first:
                self.unfinished = self._unfinished(encoded)
            going_on = self.unfinished if first else None
            self.incoming[encoded.number] = _Incoming(
                encoded,
                self.fingerprints.pop(encoded.number),
                going_on.id if going_on else None,
                going_on.start if going_on else 0,
                going_on.tokens if going_on else int(self.fresh_stream and first),
            )
            first = False
            yield encoded
            self.bytes_read += encoded.size_bytes
            self.tokens_read += encoded.tokens

    def _unfinished(self, encoded: EncodedDocument) -> StoredDocument | None:
        stored = self.catalog.latest_document(encoded.name)
        same = stored and stored.fingerprint == self.fingerprints[encoded.number]
        return stored if stored and same and stored.stop == self.rows else None

    def _windows(self) -> Iterator[Window]:
        encoded = self._encoded()
        first = next(encoded, None)
        if first is None:
            return
        skip = self.unfinished.tokens if self.unfinished else 0

        def all_encoded() -> Iterator[EncodedDocument]:
            yield first
            yield from encoded

        yield from cut_windows(
            all_encoded(), self.lm.start_token, self.store.windowing, skip, self.history
        )

    def _estimated_tokens(self) -> float | None:
        if self.total_bytes is None or not self.bytes_read:
            return None
        return self.tokens_read * self.total_bytes / self.bytes_read

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
        """Return the keys of the windows' new positions in their order and the disk's dtype."""
        starts = np.cumsum([0] + [window.new for window in windows]).tolist()
        settings = self.store.settings
        keys = torch.empty(starts[-1], settings.dimension, dtype=self.store.key_dtype)
        for number, window_keys in read_keys(self.lm, windows, self.batch_tokens):
            stored = window_keys.to(self.store.key_dtype)
            if not bool(stored.isfinite().all()):
                self._refuse(windows[number], window_keys)
            keys[starts[number] : starts[number + 1]] = stored
            advance(windows[number].new, self._estimated_tokens())
        return keys

    def _refuse(self, window: Window, keys: Float[Tensor, "new dim"]) -> None:
        name = self.incoming[window.spans[0].document].encoded.name
        if bool(keys.isfinite().all()):
            largest = float(keys.abs().max())
            raise NonFiniteKeysError(
                f"key_dtype {self.store.settings.key_dtype} cannot hold a key of {name} (largest "
                f"magnitude {largest:.4g}); build another datastore with key_dtype bfloat16"
            )
        raise NonFiniteKeysError(
            f"a key of {name} is not finite: {self.lm.name} in {self.lm.dtype} gives NaN or "
            "infinity there; load it in float32 or leave the document out"
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
                if document.id is None and document.passed:  # all of it was passed over
                    self._add(document)
                    self._extend(document)
            if self.streaming:
                catalog.set("stream_tail", self.history.tolist())
        for number in [n for n, document in self.incoming.items() if _is_complete(document)]:
            self.in_flight.pop(self.incoming.pop(number).encoded.name, None)

    def _add(self, document: _Incoming) -> None:
        name = document.encoded.name
        document.start = self.rows
        document.id = self.catalog.add_document(name, document.fingerprint, self.rows)

    def _extend(self, document: _Incoming) -> None:
        assert document.id is not None
        complete = _is_complete(document)
        self.catalog.extend_document(document.id, self.rows, document.passed, complete)
        if complete:  # its older versions leave as it enters
            name = document.encoded.name
            for older in self.catalog.documents(
                "name = ? AND id < ? AND NOT forgotten", name, document.id
            ):
                self.catalog.forget_document(older.id)


def _is_complete(document: _Incoming) -> bool:
    return document.encoded.exhausted and document.passed == document.encoded.tokens
