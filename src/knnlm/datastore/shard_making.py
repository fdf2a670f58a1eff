"""Windows → the file of a shard: the unit of work of a build, and who does it.

Knows the model and the form of a shard. Knows no documents but by number and name, no catalog.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from knnlm.datastore.catalog import SHARDS, ShardFile
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE
from knnlm.datastore.shards import save_shard
from knnlm.datastore.unfit_keys import measurable, unfit_new_key
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import key_batches, read_batch
from knnlm.progress import Advance
from knnlm.text.windows import Window


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What becomes one shard, and is committed at once.

    covered: windows in the order of their rows. passed_over: the block at the head of a stream that
    is read by nobody. names: of the windows' documents, by their numbers.
    identified: identities of stored documents that were found before, see `Matching`.
    expected_tokens: of all documents, estimated, for progress.
    """

    covered: Sequence[Window]
    names: Mapping[int, str] = field(default_factory=dict)
    passed_over: Window | None = None
    identified: tuple[str, ...] = ()
    expected_tokens: float | None = None

    @property
    def windows(self) -> list[Window]:
        """The windows to be read: those that have entries."""
        return [window for window in self.covered if window.rows]


@dataclass(frozen=True, slots=True)
class MadeShard:
    """A shard's file under a temporary name in the folder of shards; None without windows."""

    unit: Unit
    file: ShardFile | None


class DocumentsSetAsideError(Exception):
    """Reading these documents ended two workers; numbers: as in the unit's windows."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(f"reading documents {list(numbers)} ended two workers")
        self.numbers = tuple(numbers)


@runtime_checkable
class ShardMaker(Protocol):
    """Whoever makes the shards of a build: this process, or workers."""

    def make(
        self, store: Datastore, units: Iterator[Unit], advance: Advance
    ) -> Generator[MadeShard, None, None]:
        """Yield the shards of the units, in their order; may take units ahead.

        The generator is closed, or used up, before another is asked for. Raises the errors of
        reading a unit when its turn has come, and DocumentsSetAsideError.
        """
        ...


class ShardReading:
    """Reads the keys of a shard's windows batch by batch.

    names: of the windows' documents, by number. key_dtype: of the keys on disk.
    """

    def __init__(
        self,
        lm: LanguageModel,
        windows: Sequence[Window],
        names: Mapping[int, str],
        key_dtype: str,
    ) -> None:
        self._lm = lm
        self._windows = windows
        self._names = names
        self._key_dtype = key_dtype
        self._starts: list[int] = np.cumsum([0] + [window.rows for window in windows]).tolist()
        dtype: torch.dtype = getattr(torch, key_dtype)
        self._keys = torch.empty(self._starts[-1], lm.dimension, dtype=dtype)

    def batches(self) -> Iterator[list[int]]:
        """Yield the numbers of windows to be read at once; all of them are to be read."""
        return key_batches(self._lm, self._windows)

    def read(self, batch: Sequence[int]) -> None:
        """Read a batch. Raises NonFiniteKeysError for keys that cannot be stored."""
        for number, window_keys in read_batch(self._lm, self._windows, batch):
            chosen = self._windows[number].stored
            if chosen is not None:
                window_keys = window_keys[torch.from_numpy(chosen)]
            stored = window_keys.to(self._keys.dtype)
            if not bool(measurable(stored).all()):
                name = self._names[self._windows[number].spans[0].document]
                model = f"{self._lm.name} in {self._lm.dtype}"
                raise unfit_new_key(name, window_keys, self._key_dtype, model)
            self._keys[self._starts[number] : self._starts[number + 1]] = stored

    def save(self, path: Path) -> ShardFile:
        """Write the shard to a file, not yet durably. Raises DatastoreWriteError."""
        values = torch.from_numpy(np.concatenate([window.values for window in self._windows]))
        return save_shard(path, self._keys, values)


class InThisProcess:
    """Makes each shard when it is asked for."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm

    def make(
        self, store: Datastore, units: Iterator[Unit], advance: Advance
    ) -> Generator[MadeShard, None, None]:
        """Yield the shards of the units; see `ShardMaker`."""
        for unit in units:
            file = None
            if windows := unit.windows:
                key_dtype = store.settings.key_dtype
                reading = ShardReading(self._lm, windows, unit.names, key_dtype)
                for batch in reading.batches():
                    reading.read(batch)
                    for number in batch:
                        advance(windows[number].new, unit.expected_tokens)
                name = store.catalog.next_shard_name() + ASIDE
                file = reading.save(store.path / SHARDS / name)
            yield MadeShard(unit, file)
