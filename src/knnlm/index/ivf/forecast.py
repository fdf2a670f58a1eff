"""What building an inverted file will take, before it begins: time, disk and memory.

Measures a sample for a second; refuses what cannot succeed. Writes nothing that stays.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, writing
from knnlm.datastore.stored_index import FOLDER
from knnlm.datastore.unfinished import unfinished_folder
from knnlm.errors import DatastoreWriteError, InvalidArgumentError
from knnlm.index.available_memory import default_memory, own_memory_bytes
from knnlm.index.backend import IndexOptions
from knnlm.index.ivf.build import IN_MEMORY_BYTES, Work
from knnlm.index.ivf.codes import CodeShape
from knnlm.index.ivf.groups import Groups
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.records import Recorder, record_dtype
from knnlm.index.ivf.training import ROUNDS, fit_coder, sample_keys, sample_size
from knnlm.rules import shown_bytes, shown_seconds
from knnlm.threads import workers

_LOG = logging.getLogger(__name__)
_SAMPLE_KEYS = 16_384
_TRIED_BYTES = 64 << 20
_UNMEASURED_BYTES_A_SECOND = 1e9
_HASHED_BYTES_A_SECOND = 1e9
_MEASURING_QUERIES = 256
_MEASURING_BYTES = 512 << 20  # what exact search and the index's own hold for them
_OPENED_BYTES = 8  # a row: which are live, and were seen; norms where some are forgotten
_LEAST_BUFFERS = 192 << 20
_SMALL_BYTES = 64 << 20  # of records: so few are indexed in whatever memory there is


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a build will take.

    shape: of the codes, with the dimensions that keep the variance where these were left open.
    record_bytes: of each key, in a bucket and about so many in the index. seconds: without those of
    choosing nprobe.
    """

    shape: CodeShape
    record_bytes: int
    seconds_a_key: float
    training_seconds: float
    measuring_seconds: float
    written_bytes_a_second: float

    def seconds(self, work: Work) -> float:
        """Return how long a build takes, about."""
        coding = self.seconds_a_key * work.size_bytes / self.record_bytes
        writing = work.size_bytes / self.written_bytes_a_second
        hashing = work.size_bytes / _HASHED_BYTES_A_SECOND
        brought = coding + writing if work.in_memory else max(coding, writing) + writing
        return self.training_seconds + brought + hashing + self.measuring_seconds


def preview(
    store: Datastore, nlist: int, shape: CodeShape, key_dtype: torch.dtype | None, seed: int
) -> Forecast:
    """Code a sample of the keys, with lists that were not learned, and take the time."""
    sample = sample_keys(store, _SAMPLE_KEYS, seed)
    if len(sample) == 0:
        sample = torch.zeros(1, store.settings.dimension)
    coder = fit_coder(sample, shape, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(sample), (nlist,), generator=generator)
    lists = Lists.around(sample[chosen], coder, key_dtype)
    recorder = Recorder(store, lists, 0)
    groups = Groups(lists.centroids, store.rows, seed)
    chunks = workers().chunks(len(sample), recorder.rows_at_once)

    def record(chunk: range) -> None:
        recorder.records(0, sample[chunk.start : chunk.stop].to(store.key_dtype), groups)

    def assign(chunk: range) -> None:
        groups.nearest(sample[chunk.start : chunk.stop])

    seconds = _seconds_a_key(record, chunks)
    training = _seconds_a_key(assign, chunks)
    learned_on = sample_size(store.rows, store.settings.dimension, nlist, 1 << 62)
    return Forecast(
        replace(shape, dimensions=coder.code_dim),
        record_dtype(lists, store.rows).itemsize,
        seconds,
        training * learned_on * ROUNDS,
        store.rows * _seconds_a_product(sample),
        _written_bytes_a_second(store.path, store.rows * record_dtype(lists, store.rows).itemsize),
    )


def planned_work(
    store: Datastore,
    options: IndexOptions,
    nlist: int,
    shape: CodeShape,
    key_dtype: torch.dtype | None,
) -> tuple[CodeShape, Work]:
    """Return the codes' shape and how to build, after saying what that will take.

    Raises InvalidArgumentError where the memory cannot suffice, DatastoreWriteError where the disk
    cannot.
    """
    forecast = preview(store, nlist, shape, key_dtype, options.seed)
    limit = default_memory() if options.memory is None else options.memory
    size_bytes = store.rows * forecast.record_bytes
    dim = store.settings.dimension
    least_sample = 2 * 4 * dim * sample_size(store.rows, dim, nlist, 0)
    least = _held_bytes(store, nlist) + max(_LEAST_BUFFERS, least_sample)
    if limit < least and size_bytes > _SMALL_BYTES:
        raise InvalidArgumentError(
            f"memory must be at least {shown_bytes(least)} to index {store.rows:,} entries of "
            f"{dim} dimensions, got {shown_bytes(limit)}: allow more with --memory, or choose "
            "kind exact"
        )
    options_of_files = {
        "nlist": nlist,
        "code_dim": forecast.shape.dimensions,
        "code_bits": shape.bits,
        "copied": bool(key_dtype),
    }
    buffers = buffer_bytes(store, nlist, limit)
    work = Work(options_of_files, key_dtype, size_bytes, buffers, options.seed, options.progress)
    _check_disk(store, work)
    seconds = forecast.seconds(work)
    _LOG.info(
        f"indexing {store.rows:,} entries will take about {shown_seconds(seconds)}, "
        f"{shown_bytes(_disk_bytes(work))} of disk and up to {shown_bytes(limit)} of memory"
    )
    return forecast.shape, work


def buffer_bytes(store: Datastore, nlist: int, memory: int | None) -> int:
    """Return what a build may hold beside what the process has, and what its index will take.

    memory: see `IndexOptions`.
    """
    limit = default_memory() if memory is None else memory
    return max(_LEAST_BUFFERS, limit - _held_bytes(store, nlist))


def _held_bytes(store: Datastore, nlist: int) -> int:
    lists = 16 * nlist * store.settings.dimension
    return own_memory_bytes() + _MEASURING_BYTES + _OPENED_BYTES * store.rows + lists


def _disk_bytes(work: Work) -> int:
    """Return what a build writes, at most, before anything is deleted."""
    beside = 0 if work.in_memory else 3 * work.size_bytes // work.buckets
    return work.size_bytes + beside


def _check_disk(store: Datastore, work: Work) -> None:
    begun = unfinished_folder(store.path)
    there = sum(path.stat().st_size for path in begun.iterdir()) if begun.is_dir() else 0
    free = shutil.disk_usage(store.path).free + there
    needed = _disk_bytes(work)
    if needed > free:
        raise DatastoreWriteError(
            f"cannot write {store.path / FOLDER}: the disk is too full for an index of about "
            f"{shown_bytes(needed)}, {shown_bytes(free)} are free; free some space and run the "
            "same command again, or choose a smaller kind with --kind"
        )


def _seconds_a_key(function: Callable[[range], None], chunks: list[range]) -> float:
    """Return the time a key takes when all threads are busy."""
    workers().map(function, chunks[: workers().threads])  # compiles
    started = time.perf_counter()
    workers().map(function, chunks)
    return (time.perf_counter() - started) / sum(len(chunk) for chunk in chunks)


def _seconds_a_product(sample: Float[Tensor, "n dim"]) -> float:
    """Return the time that exact search takes for a key."""
    some = sample[:_MEASURING_QUERIES]
    started = time.perf_counter()
    (some @ sample.T).amin()
    return (time.perf_counter() - started) / len(sample)


def _written_bytes_a_second(folder: Path, size_bytes: int) -> float:
    """Return how fast the disk takes what is written; of little it is not measured."""
    if size_bytes <= IN_MEMORY_BYTES:
        return _UNMEASURED_BYTES_A_SECOND
    path = folder / FOLDER / f"speed{ASIDE}"
    with writing(folder):
        path.parent.mkdir(exist_ok=True)
        started = time.perf_counter()
        try:
            with path.open("wb") as file:
                file.write(os.urandom(_TRIED_BYTES // 16) * 16)
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
    return _TRIED_BYTES / (time.perf_counter() - started)
