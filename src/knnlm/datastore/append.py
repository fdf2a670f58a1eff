"""Storing documents in a datastore: resumable, with the same result however often it is killed.

A shard's file and its documents become visible in one transaction, in the order of the plan. Knows
neither how windows are grouped nor who reads their keys.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from knnlm.choices import Boundary
from knnlm.datastore.catalog import SHARDS, StoredShard
from knnlm.datastore.create import open_or_create
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shard_making import (
    DocumentsSetAsideError,
    InThisProcess,
    MadeShard,
    ShardMaker,
)
from knnlm.datastore.shard_plan import Incoming, ShardPlan, Tally
from knnlm.datastore.shards import publish_shard
from knnlm.datastore.sources import Changes, check_sync
from knnlm.errors import InvalidTextError, WorkerError
from knnlm.model.language_model import LanguageModel
from knnlm.progress import SILENT, Progress
from knnlm.rules import LARGEST, check_whole
from knnlm.text.documents import Document
from knnlm.text.windows import Window

_LOG = logging.getLogger(__name__)


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
    maker: ShardMaker | None = None,
    progress: Progress = SILENT,
) -> Datastore:
    """Store every token of `documents` with the key that preceded it; leaves the index as it is.

    The arguments and errors are those of `knnlm.build`, which also keeps the index up to date.
    shard_rows: rows committed at once; by default an eighth of the rows stored, at least 8,192.
    maker: who reads the keys; by default this process with `lm`.
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
        appender = _Appender(store, lm, documents, shard_rows, maker or InThisProcess(lm))
        changes = appender.run(max_entries, sync, progress)
        if (unreadable := appender.plan.unreadable) is not None:
            raise InvalidTextError(
                f"{unreadable}; what came before it is stored, the rest is left out"
            ) from unreadable
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


class _Appender:
    """Commits the documents that a datastore lacks shard by shard."""

    def __init__(
        self,
        store: Datastore,
        lm: LanguageModel,
        documents: Iterable[Document],
        shard_rows: int | None,
        maker: ShardMaker,
    ) -> None:
        self.store = store
        self.catalog = store.catalog
        self.lm = lm
        self.documents = documents
        self.shard_rows = shard_rows
        self.maker = maker
        self.tally = Tally(store.catalog.last_document, store.rows)
        self._begin()

    def _begin(self) -> None:
        """Plan what is missing now."""
        self.store.refresh()
        self.plan = ShardPlan(self.store, self.lm, self.documents, self.shard_rows, self.tally)
        self.rows = self.store.rows
        self.history = self.plan.history

    def run(self, max_entries: int | None, sync: bool, progress: Progress) -> Changes:
        """Store everything that is missing, up to `max_entries` rows in the datastore.

        Then, unless these stopped it, take out what is gone from its source.
        """
        with progress.task("build", None, "tokens") as advance:
            while True:
                units = self.plan.units(max_entries)
                try:
                    with closing(self.maker.make(self.store, units, advance)) as shards:
                        for shard in shards:
                            self._commit(shard)
                    break
                except DocumentsSetAsideError as error:
                    self._set_aside([self.plan.incoming[number] for number in error.numbers])
                    self._begin()
        if self.plan.unreadable is not None:  # what broke off may never be right again
            self._forget(self.plan.incoming.values())
        return self._finish(all_read=self.plan.all_met and not self.plan.stopped, sync=sync)

    def _forget(self, incomplete: Iterable[Incoming]) -> None:
        """Forget what is stored of documents that do not go on."""
        stored = [document.id for document in incomplete if document.id is not None]
        if stored:
            with self.catalog.transaction():
                for number in stored:
                    self.catalog.forget_document(number)

    def _set_aside(self, documents: Sequence[Incoming]) -> None:
        """Leave documents out of this build, as if they were not in their source."""
        names = ", ".join(document.name for document in documents)
        if isinstance(self.documents, Iterator):
            raise WorkerError(
                f"reading {names} ended two workers, and an iterator cannot be read again without "
                "it: leave it out, or give a sequence of documents"
            )
        _LOG.warning("reading %s ended two workers: it is set aside", names)
        self._forget(documents)
        self.tally.set_aside |= {document.identity: document.name for document in documents}

    def _remember(self, window: Window) -> None:
        if self.store.settings.boundary == Boundary.stream:
            tokens = np.concatenate([self.history, window.tokens[1 + window.context :]])
            if len(self.history) == 0:
                tokens = window.tokens
            self.history = tokens[-(self.store.settings.context + 1) :]

    def _commit(self, shard: MadeShard) -> None:
        """Publish a shard's file and make it visible together with its documents."""
        unit, catalog = shard.unit, self.catalog
        if unit.passed_over is not None:
            for span in unit.passed_over.spans:
                self.plan.incoming[span.document].passed += span.count
            self._remember(unit.passed_over)
        file = shard.file
        if file is not None:
            path = self.store.path / SHARDS / file.name
            file = publish_shard(path, file, catalog.next_shard_name())
        start = self.rows
        with catalog.transaction():
            self.plan.known.identify(unit.identified)
            if file is not None:
                catalog.add_shard(StoredShard(start, file))
            for window in unit.covered:
                for span in window.spans:
                    document = self.plan.incoming[span.document]
                    if document.id is None:
                        self._add(document)
                    document.passed += span.count
                    # what is stored in part has windows of its own
                    self.rows += span.count if window.stored is None else window.rows
                    self._extend(document)
                self._remember(window)
            for document in self.plan.incoming.values():
                if document.id is None and document.passed:  # all its tokens were passed over
                    self._add(document)
                    self._extend(document)
            if self.store.settings.boundary == Boundary.stream:
                catalog.set("stream_tail", self.history.tolist())
        self.plan.finish_complete()

    def _add(self, document: Incoming) -> None:
        document.start = self.rows
        document.id = self.catalog.add_document(
            document.name, document.identity, document.fingerprint, self.rows
        )

    def _extend(self, document: Incoming) -> None:
        assert document.id is not None
        complete = document.is_complete
        self.catalog.extend_document(document.id, self.rows, document.passed, complete)
        if complete:  # in the same transaction it replaces its older versions
            older = self.catalog.versions(document.identity)[:-1]
            for version in older:
                self.catalog.forget_document(version.id)
            self.tally.replaced += bool(older)
            self.tally.added += not older

    def _finish(self, all_read: bool, sync: bool) -> Changes:
        """Forget what is gone, in one transaction, if all sources were read to their ends."""
        known = self.plan.known
        if known.identified:
            with self.catalog.transaction():
                known.identify(tuple(known.identified))
        changes = self.tally.changes()
        if not all_read:
            return changes
        # a text that has become empty replaces the older one by nothing
        gone = known.find_gone()
        removed = gone.rows + (gone.files if sync else [])
        removed += [d for identity in self.plan.unread() for d in self.catalog.versions(identity)]
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
