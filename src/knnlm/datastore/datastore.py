"""Datastore: the stored entries of a text as users open them: keys, values, documents, passages."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.catalog import (
    SHARDS,
    Catalog,
    Settings,
    ShardFile,
    StoredShard,
)
from knnlm.datastore.facts import (
    checked_documents,
    is_learned,
    read_snapshot,
    store_parameters,
    tuned_parameters,
)
from knnlm.datastore.files import writer_lock
from knnlm.datastore.folder import remove_strays
from knnlm.datastore.origin import is_unverified
from knnlm.datastore.shards import Shard, check_values, open_shard
from knnlm.datastore.sources import Changes, find_named
from knnlm.datastore.tables import StoredDocument
from knnlm.datastore.unfit_keys import unfit_key
from knnlm.errors import DatastoreCorruptError, InvalidArgumentError
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.stored import TunedMixture
from knnlm.rules import check_whole
from knnlm.text.windows import Windowing

if TYPE_CHECKING:  # a datastore is searched without a model, which takes seconds to import
    from knnlm.model.keyed_model import KeyedModel
    from knnlm.model.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Passage:
    """The text around an entry: the tokens before its value, the value, the tokens after."""

    document: StoredDocument
    before: Int[Tensor, " before"]
    value: int
    after: Int[Tensor, " after"]


class Datastore:
    """An open datastore: a snapshot of its committed entries, which `refresh` brings up to date.

    The snapshot is whole: keys, values, documents and passages stay as they are, whatever other
    processes append, forget or compact.

    A row is an entry's number, 0 … rows − 1 in corpus order, stable until `compact`. A document is
    a contiguous range of rows, so the text before any entry is `values[document.start:row]`.

    Raises DatastoreNotFoundError and DatastoreCorruptError (missing or truncated files). What else
    is damaged is found by `verify`, and is a DatastoreCorruptError where it is met.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.catalog = Catalog(self.path)
        self.settings: Settings = self.catalog.settings
        self.generation = -1
        self.changes: Changes | None = None
        """What the build that returned this datastore did; None if it was only opened."""
        self._open: dict[str, Shard | DatastoreCorruptError] = {}
        self.refresh()

    def __len__(self) -> int:
        """Return the number of live entries: stored and not forgotten."""
        return self.rows - self.forgotten_rows

    def close(self) -> None:
        """Release the catalog's file."""
        self.catalog.close()

    def reopened(self) -> "Datastore":
        """Return a snapshot of what is committed now: this one if nothing was committed since.

        Unlike `refresh`, it leaves this snapshot as it is. Parameters and indexes that were stored
        meanwhile count as well as entries. Raises what opening a datastore does.
        """
        changed = self.catalog.has_changed or self.catalog.generation != self.generation
        return Datastore(self.path) if changed else self

    def refresh(self) -> bool:
        """Read what other writers have committed since; return whether anything changed.

        Maps all shards, because a mapped file stays readable after a compaction removed it.
        """
        if self.catalog.generation == self.generation:
            return False
        while True:
            snapshot = read_snapshot(self.path, self.catalog)
            opened = {shard.file.name: self._opened(shard.file) for shard in snapshot.shards}
            if self.catalog.generation == snapshot.generation:
                break  # else files may have been replaced before they were mapped
        self.snapshot = snapshot
        self.shards: list[StoredShard] = snapshot.shards
        self._starts = [shard.start for shard in snapshot.shards]
        self._open = opened
        self.rows = snapshot.rows
        self._documents: list[StoredDocument] | None = None
        self._values: Tensor | None = None
        self.numbering = snapshot.numbering
        self.generation = snapshot.generation
        return True

    def _opened(self, file: ShardFile) -> Shard | DatastoreCorruptError:
        """Map a shard, or return why that fails: `verify` can open a damaged datastore."""
        if isinstance(shard := self._open.get(file.name), Shard):
            return shard
        try:
            return open_shard(self.path / SHARDS, file, self.settings)
        except DatastoreCorruptError as error:
            return error

    def _shard(self, shard: StoredShard) -> Shard:
        self._all_documents()  # whose rows have to fit the shards'
        opened = self._open[shard.file.name]
        if isinstance(opened, DatastoreCorruptError):
            raise opened
        return opened

    def _all_documents(self) -> list[StoredDocument]:
        """Return the documents of the snapshot, forgotten ones among them."""
        if self._documents is None:
            self._documents = checked_documents(self.path, self.catalog, self.snapshot)
            stored = sorted(self._documents, key=lambda d: d.start)
            self._by_row = [document for document in stored if document.stop > document.start]
            self._forgotten = [document for document in stored if document.forgotten]
            self._forgotten_rows = sum(d.stop - d.start for d in self._forgotten)
        return self._documents

    @property
    def forgotten_rows(self) -> int:
        """Entries of forgotten documents that are still stored."""
        self._all_documents()
        return self._forgotten_rows

    @property
    def key_dtype(self) -> torch.dtype:
        """The dtype of the keys on disk."""
        dtype: torch.dtype = getattr(torch, self.settings.key_dtype)
        return dtype

    @property
    def windowing(self) -> Windowing:
        """How the stored text was cut into windows."""
        settings = self.settings
        return Windowing(
            settings.window, settings.context, settings.boundary, settings.control_tokens
        )

    @property
    def values(self) -> Int[Tensor, " rows"]:
        """The token that followed each row's key, int32, in memory."""
        if self._values is None:
            parts = [self._values_of(shard, 0, shard.file.rows) for shard in self.shards]
            self._values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        return self._values

    @property
    def alive(self) -> Bool[Tensor, " rows"]:
        """False for the rows of forgotten documents."""
        alive = torch.ones(self.rows, dtype=torch.bool)
        self._all_documents()
        for document in self._forgotten:
            alive[document.start : document.stop] = False
        return alive

    def key_blocks(
        self, max_rows: int, first_row: int = 0
    ) -> Iterator[tuple[int, Float[Tensor, "rows dim"]]]:
        """Yield (row of the first key, memory-mapped keys) in row order, from `first_row` on."""
        for shard in self.shards:
            if shard.stop <= first_row:
                continue
            keys = self._shard(shard).keys
            for start in range(max(first_row - shard.start, 0), len(keys), max_rows):
                yield shard.start + start, keys[start : start + max_rows]

    def keys_at(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
        """Gather the keys of any rows, in the dtype on disk; the disk is read in row order.

        Raises DatastoreCorruptError for a key that is not finite and not forgotten.
        """
        keys = torch.empty(len(rows), self.settings.dimension, dtype=self.key_dtype)
        ascending, places = rows.sort()
        edges = torch.tensor([*self._starts, self.rows])
        bounds = torch.searchsorted(ascending, edges).tolist()
        for shard, (low, high) in zip(self.shards, pairwise(bounds), strict=True):
            if high > low:
                chosen = self._shard(shard).keys[ascending[low:high] - shard.start]
                if not bool(chosen.isfinite().all()):
                    self._refuse_live(ascending[low:high], chosen)
                keys[places[low:high]] = chosen
        return keys

    def _refuse_live(self, rows: Int[Tensor, " n"], keys: Float[Tensor, "n dim"]) -> None:
        unfit = rows[~keys.isfinite().all(dim=1)]
        if len(live := unfit[self.alive[unfit]]):
            raise self.unfit_key(int(live[0]))

    def unfit_key(self, row: int) -> DatastoreCorruptError:
        """Return the error for a row whose key is not `measurable`."""
        shard = self.shards[bisect_right(self._starts, row) - 1]
        key = self._shard(shard).keys[row - shard.start]
        return unfit_key(self.path / SHARDS / shard.file.name, row, self.document_at(row).name, key)

    def documents(self) -> list[StoredDocument]:
        """Return the documents that are not forgotten, in the order they were stored."""
        return [document for document in self._all_documents() if not document.forgotten]

    def document_at(self, row: int) -> StoredDocument:
        """Return the document of a row, forgotten or not. Raises DatastoreCorruptError."""
        self._all_documents()
        place = bisect_right(self._by_row, row, key=lambda document: document.start) - 1
        if place < 0 or row >= self._by_row[place].stop:
            raise self.catalog.damaged(f"no document holds row {row}")
        return self._by_row[place]

    def passage(self, row: int, before: int = 24, after: int = 8) -> Passage:
        """Return a row's value with up to `before` and `after` tokens of its document around it.

        Raises InvalidArgumentError for numbers below 0.
        """
        before = check_whole("before", before, least=0)
        after = check_whole("after", after, least=0)
        document = self.document_at(row)
        left = self._slice_values(max(document.start, row - before), row)
        right = self._slice_values(row + 1, min(document.stop, row + 1 + after))
        return Passage(document, left, int(self._slice_values(row, row + 1)[0]), right)

    def _slice_values(self, start: int, stop: int) -> Int[Tensor, " n"]:
        first = bisect_right(self._starts, start) - 1
        parts = [torch.empty(0, dtype=torch.int32)]
        for shard in self.shards[first:]:
            if shard.start >= stop:
                break
            low, high = max(start - shard.start, 0), max(stop - shard.start, 0)
            parts.append(self._values_of(shard, low, high))
        return torch.cat(parts)

    def _values_of(self, shard: StoredShard, low: int, high: int) -> Int[Tensor, " n"]:
        values = self._shard(shard).values[low:high]
        check_values(self.path / SHARDS / shard.file.name, values, self.settings.vocab_size)
        return values

    @property
    def parameters(self) -> Parameters | None:
        """The defaults that `tune` stored; None before tuning. Raises DatastoreCorruptError."""
        stored = tuned_parameters(self.catalog)
        try:
            return None if stored is None else Parameters(**stored)
        except (TypeError, InvalidArgumentError) as error:
            raise self.catalog.damaged(f"its parameters cannot be used: {error}") from error

    @property
    def tuning(self) -> dict[str, Any] | None:
        """How the stored parameters were tuned: the text, the trials, the perplexities."""
        tuning: dict[str, Any] | None = self.catalog.get("tuning")
        return tuning

    def mixture(self, others: Sequence["Datastore"] = ()) -> TunedMixture | None:
        """Return the mixture that `tune` stored for this datastore and others, in their order."""
        stored = self.catalog.get("mixture")
        if stored is None or stored["others"] != [_resolved(other) for other in others]:
            return None
        return TunedMixture.from_dict(stored)

    @property
    def is_unverified(self) -> bool:
        """Whether it was imported, and no model has proved yet that its keys are its own."""
        return is_unverified(self.catalog)

    @property
    def is_learned(self) -> bool:
        """Whether `tune` stored a gate that chooses the weights of each token."""
        return is_learned(self.catalog)

    def save_parameters(
        self,
        parameters: Parameters,
        tuning: dict[str, Any],
        mixture: TunedMixture | None = None,
        others: Sequence["Datastore"] = (),
    ) -> None:
        """Store default parameters for this datastore, and how they were tuned.

        mixture: for this datastore and the others together; None removes a stored one.
        """
        stored = None if mixture is None else mixture.to_dict()
        if stored is not None:
            stored["others"] = [_resolved(other) for other in others]
        with self.writer(), self.catalog.transaction(entries_change=False):
            store_parameters(self.catalog, asdict(parameters))
            self.catalog.set("tuning", tuning)
            self.catalog.set("mixture", stored)

    def check_model(self, model: "KeyedModel") -> None:
        """Refuse a language model whose keys or tokens are not comparable with the stored ones.

        For a model without a tokenizer, tokens are not checked. Raises DatastoreMismatchError,
        naming both models.
        """
        from knnlm.datastore.same_model import check_same_model

        check_same_model(self.path, self.settings, model)

    def load_model(
        self, name: str | Path | None = None, *, dtype: str | None = None, device: str = "auto"
    ) -> "LanguageModel":
        """Load the language model that computed the keys.

        name: another place to load it from. dtype: by default the one used in building. Raises the
        errors of `LanguageModel.load`.
        """
        from knnlm.model.language_model import LanguageModel

        return LanguageModel.load(
            name or self.settings.model,
            key=self.settings.key,
            dtype=dtype or self.settings.model_dtype,
            device=device,
            revision=None if name else self.settings.revision,
        )

    @contextmanager
    def writer(self) -> Iterator[Catalog]:
        """Lock the datastore for writing, refresh, and delete the files that do not belong to it.

        Raises DatastoreLockedError if another process is writing.
        """
        with writer_lock(self.path):
            self.refresh()
            remove_strays(self.path, self.catalog)
            yield self.catalog

    def forget(self, names: Sequence[str]) -> list[StoredDocument]:
        """Exclude documents from every search, at once; `compact` removes their bytes later.

        names: exact names; paths of files, folders or files of rows, for all documents in them; or
        patterns of names with * ? [ ]. Returns the forgotten documents. Raises
        InvalidArgumentError, changing nothing, if a name matches no document, or if it is the name
        of one and the path of another.
        """
        with self.writer() as catalog:
            documents = catalog.live_documents()
            chosen: dict[int, StoredDocument] = {}
            for name in names:
                matching = find_named(documents, name)
                if not matching:
                    raise InvalidArgumentError(
                        f"{self.path} has no document {name!r}; knnlm info --documents lists them"
                    )
                chosen.update((document.id, document) for document in matching)
            with catalog.transaction():
                for number in chosen:
                    catalog.forget_document(number)
        self.refresh()
        return list(chosen.values())


def open_datastore(store: Datastore | str | Path) -> Datastore:
    """Return a datastore, opened if it is named by its folder's path.

    Raises InvalidArgumentError for another type, and what opening a `Datastore` raises.
    """
    if isinstance(store, Datastore):
        return store
    if not isinstance(store, str | Path):
        raise InvalidArgumentError(
            "store must be a datastore, its folder's path, or a sequence of these where several "
            f"are possible, got {store!r} ({type(store).__name__})"
        )
    return Datastore(store)


def _resolved(store: Datastore) -> str:
    return str(store.path.resolve())
