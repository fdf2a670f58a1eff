"""Datastore: the stored entries of a text as users open them: keys, values, documents, passages."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.catalog import SHARDS, Catalog, Settings, StoredDocument, StoredShard
from knnlm.datastore.facts import is_learned, read_snapshot
from knnlm.datastore.files import remove_files_except, writer_lock
from knnlm.datastore.shards import Shard, open_shard
from knnlm.errors import (
    DatastoreChangedError,
    DatastoreCorruptError,
    DatastoreMismatchError,
    InvalidArgumentError,
)
from knnlm.mixture.parameters import Parameters
from knnlm.mixture.stored import TunedMixture
from knnlm.model.keyed_model import KeyedModel
from knnlm.model.language_model import LanguageModel
from knnlm.text.windows import Windowing


@dataclass(frozen=True, slots=True)
class Passage:
    """The text around an entry: the tokens before its value, the value, the tokens after."""

    document: StoredDocument
    before: Int[Tensor, " before"]
    value: int
    after: Int[Tensor, " after"]


class Datastore:
    """An open datastore: a snapshot of its committed entries, which `refresh` brings up to date.

    A row is an entry's number, 0 … rows − 1 in corpus order, stable until `compact`. A document is
    a contiguous range of rows, so the text before any entry is `values[document.start:row]`.

    Raises DatastoreNotFoundError and DatastoreCorruptError (missing or truncated files; contents
    are checked by `verify`).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.catalog = Catalog(self.path)
        self.settings: Settings = self.catalog.settings
        self.generation = -1
        self.refresh()

    def __len__(self) -> int:
        """Return the number of live entries: stored and not forgotten."""
        return self.rows - self.forgotten_rows

    def close(self) -> None:
        """Release the catalog's file."""
        self.catalog.close()

    def refresh(self) -> bool:
        """Read what other writers have committed since; return whether anything changed."""
        if self.catalog.generation == self.generation:
            return False
        snapshot = read_snapshot(self.path, self.catalog, "forgotten")
        self.shards: list[StoredShard] = snapshot.shards
        self._starts = [shard.start for shard in snapshot.shards]
        self._open: dict[str, Shard] = {}
        self.rows = snapshot.rows
        self._forgotten = snapshot.forgotten
        self.forgotten_rows = snapshot.forgotten_rows
        self._values: Tensor | None = None
        self.numbering = snapshot.numbering
        self.generation = snapshot.generation
        return True

    def _shard(self, shard: StoredShard) -> Shard:
        name = shard.file.name
        if name not in self._open:
            self._open[name] = open_shard(self.path / SHARDS, name)
        return self._open[name]

    @property
    def key_dtype(self) -> torch.dtype:
        """The dtype of the keys on disk."""
        dtype: torch.dtype = getattr(torch, self.settings.key_dtype)
        return dtype

    @property
    def windowing(self) -> Windowing:
        """How the stored text was cut into windows."""
        settings = self.settings
        return Windowing(settings.window, settings.context, settings.boundary)

    @property
    def values(self) -> Int[Tensor, " rows"]:
        """The token that followed each row's key, int32, in memory."""
        if self._values is None:
            parts = [self._shard(shard).values for shard in self.shards]
            self._values = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
        return self._values

    @property
    def alive(self) -> Bool[Tensor, " rows"]:
        """False for the rows of forgotten documents."""
        alive = torch.ones(self.rows, dtype=torch.bool)
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
        """Gather the keys of any rows, in the dtype on disk; the disk is read in row order."""
        keys = torch.empty(len(rows), self.settings.dimension, dtype=self.key_dtype)
        ascending, places = rows.sort()
        for shard in self.shards:
            edges = torch.tensor([shard.start, shard.stop])
            low, high = torch.searchsorted(ascending, edges).tolist()
            if high > low:
                inside = ascending[low:high] - shard.start
                keys[places[low:high]] = self._shard(shard).keys[inside]
        return keys

    @contextmanager
    def _same_numbering(self) -> Iterator[None]:
        with self.catalog.snapshot():
            if self.catalog.numbering != self.numbering:
                raise DatastoreChangedError(
                    f"{self.path} was compacted since it was opened, which renumbered its rows; "
                    "open it again"
                )
            yield

    def documents(self) -> list[StoredDocument]:
        """Return the documents that are not forgotten, in the order they were stored.

        Raises DatastoreChangedError if a compaction has renumbered rows since `refresh`.
        """
        with self._same_numbering():
            return self.catalog.documents("NOT forgotten")

    def document_at(self, row: int) -> StoredDocument:
        """Return the document of a row, forgotten or not; raises as `documents` does."""
        with self._same_numbering():
            return self.catalog.document_at(row)

    def passage(self, row: int, before: int = 24, after: int = 8) -> Passage:
        """Return a row's value with up to `before` and `after` tokens of its document around it."""
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
            parts.append(self._shard(shard).values[low:high])
        return torch.cat(parts)

    @property
    def parameters(self) -> Parameters | None:
        """The defaults that `tune` stored; None before tuning. Raises DatastoreCorruptError."""
        stored = self.catalog.get("parameters")
        try:
            return None if stored is None else Parameters(**stored)
        except (TypeError, InvalidArgumentError) as error:
            raise DatastoreCorruptError(
                f"{self.path}: the stored parameters cannot be used ({error}): tune it again"
            ) from error

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
            self.catalog.set("parameters", asdict(parameters))
            self.catalog.set("tuning", tuning)
            self.catalog.set("mixture", stored)

    def check_model(self, model: KeyedModel) -> None:
        """Refuse a language model whose keys or tokens are not comparable with the stored ones.

        For a model without a tokenizer, tokens are not checked. Raises DatastoreMismatchError,
        naming both models.
        """
        ours = self.settings
        pairs: list[tuple[str, object, object]] = [
            ("vocabulary size", ours.vocab_size, model.vocab_size),
            ("key dimension", ours.dimension, model.dimension),
            ("key", ours.key, model.key),
        ]
        if isinstance(model, LanguageModel):
            pairs += [
                ("tokenizer", ours.tokenizer_fingerprint[:12], model.tokenizer_fingerprint[:12]),
                ("start token", ours.start_token, model.start_token),
            ]
        pairs.append(("weights", ours.weights_fingerprint[:12], model.weights_fingerprint[:12]))
        for property_name, stored, given in pairs:
            if stored != given:
                raise DatastoreMismatchError(
                    f"{self.path} was built with {ours.model} ({property_name} {stored}), not with "
                    f"{model.name} ({property_name} {given}); load that model or build another "
                    "datastore"
                )

    def load_model(
        self, name: str | Path | None = None, *, dtype: str | None = None, device: str = "auto"
    ) -> LanguageModel:
        """Load the language model that computed the keys.

        name: another place to load it from. dtype: by default the one used in building. Raises the
        errors of `LanguageModel.load`.
        """
        return LanguageModel.load(
            name or self.settings.model,
            key=self.settings.key,
            dtype=dtype or self.settings.model_dtype,
            device=device,
            revision=None if name else self.settings.revision,
        )

    @contextmanager
    def writer(self) -> Iterator[Catalog]:
        """Lock the datastore for writing, refresh, and delete a killed writer's leftover files.

        Raises DatastoreLockedError at once if another process is writing.
        """
        with writer_lock(self.path):
            self.refresh()
            remove_files_except(self.path / SHARDS, {shard.file.name for shard in self.shards})
            yield self.catalog

    def forget(self, names: Sequence[str]) -> list[StoredDocument]:
        """Exclude documents from every search, at once; `compact` removes their bytes later.

        names: exact names, or patterns with * ? [ ]. Returns the forgotten documents. Raises
        InvalidArgumentError, changing nothing, if a name matches no document.
        """
        with self.writer() as catalog:
            documents = catalog.documents("NOT forgotten")
            chosen: dict[int, StoredDocument] = {}
            for name in names:
                matching = [d for d in documents if d.name == name] or [
                    d for d in documents if fnmatchcase(d.name, name)
                ]
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


class DocumentsByRow:
    """The documents of a datastore, without forgotten ones, for finding those of many rows.

    Holds the documents of one moment. Raises DatastoreChangedError as `Datastore.documents` does.
    """

    def __init__(self, store: Datastore) -> None:
        self.store = str(store.path)
        self._documents = store.documents()
        starts = [document.start for document in self._documents]
        self._starts = torch.tensor(starts, dtype=torch.int64)

    def at(self, rows: Int[Tensor, " n"]) -> list[StoredDocument]:
        """Return the document of each row."""
        return [self._documents[place] for place in self._places(rows).tolist()]

    def holding(self, rows: Int[Tensor, " n"]) -> list[StoredDocument]:
        """Return the documents that hold any of the rows, each once, in order."""
        return [self._documents[place] for place in torch.unique(self._places(rows)).tolist()]

    def _places(self, rows: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return torch.searchsorted(self._starts, rows.contiguous(), right=True) - 1


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
