"""Rows appended since an index was built, in files of their own next to the index.

So opening an index encodes nothing again. A file holds a run of rows, list by list, coded like the
index's own. The catalog names the files that count, in the commit that makes them visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import FOLDER, IndexFile
from knnlm.index.ivf.build import Learned, Work, coded_file
from knnlm.index.ivf.forecast import buffer_bytes
from knnlm.index.ivf.lists import Lists
from knnlm.index.ivf.parts import Part
from knnlm.index.ivf.reading import identity, read_part
from knnlm.index.ivf.records import record_dtype
from knnlm.progress import Progress

_GATHERED = 8  # a run is written again once the rows after it are an eighth of its own


@dataclass(frozen=True, slots=True)
class Run:
    """The rows first … stop − 1, coded."""

    first: int
    stop: int
    part: Part


def read_runs(store: Datastore, files: Sequence[IndexFile], lists: Lists) -> list[Run]:
    """Map the files of appended rows. Raises DatastoreCorruptError."""
    return [Run(file.first, file.stop, read_part(store, file, lists)) for file in files]


def write_run(
    store: Datastore,
    files: Sequence[IndexFile],
    lists: Lists,
    memory: int | None,
    progress: Progress,
) -> tuple[IndexFile, ...]:
    """Write the rows that no file holds yet, together with the last runs where those are short.

    files: the index's own and those of appended rows. memory: see `IndexOptions`. Returns
    the files that hold all rows. Raises DatastoreWriteError.
    """
    base, *runs = files
    start = files[-1].stop
    if start == store.rows:
        return tuple(files)
    while runs and start - runs[-1].first <= _GATHERED * (store.rows - start):
        start = runs.pop().first
    name = f"{FOLDER}/ivf-{start:012d}-{store.rows:012d}.safetensors"
    size_bytes = (store.rows - start) * record_dtype(lists, store.rows).itemsize
    buffers = buffer_bytes(store, len(lists.centroids), memory)
    options = {"appended_to": base.sha256}
    work = Work(options, lists.key_dtype, size_bytes, buffers, 0, progress)

    def learn() -> Learned:
        return Learned(lists, np.ones(len(lists.centroids), np.int64))

    with coded_file(store, store.path / name, start, learn, work) as (writer, _, starts):
        writer.write_header({"identity": identity(lists, starts)})
        writer.publish()
    return (base, *runs, IndexFile.written(store.path, name, start, store.rows))
