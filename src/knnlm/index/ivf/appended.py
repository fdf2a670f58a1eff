"""Rows appended since an index was built, in files of their own next to the index.

So opening an index encodes nothing again. A file holds a run of rows, list by list, coded like the
index's own. The catalog names the files that count, in the commit that makes them visible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import FOLDER, IndexFile
from knnlm.index.ivf.file import ArrayWriter
from knnlm.index.ivf.lists import Lists, place_rows
from knnlm.index.ivf.parts import Part, planned_part, write_part
from knnlm.index.ivf.reading import identity, read_part
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
    store: Datastore, files: Sequence[IndexFile], lists: Lists, progress: Progress
) -> tuple[IndexFile, ...]:
    """Write the rows that no file holds yet, together with the last runs where those are short.

    files: the index's own and those of appended rows. Returns the files that hold all rows. Raises
    DatastoreWriteError.
    """
    base, *runs = files
    start = files[-1].stop
    if start == store.rows:
        return tuple(files)
    while runs and start - runs[-1].first <= _GATHERED * (store.rows - start):
        start = runs.pop().first
    placement = place_rows(store, lists, start, progress)
    name = f"{FOLDER}/ivf-{start:012d}-{store.rows:012d}.safetensors"
    planned = planned_part(len(placement.rows), store.rows, lists)
    with ArrayWriter(store.path / name, planned.arrays()) as writer:
        write_part(writer, store, lists, placement, progress)
        writer.write_header({"identity": identity(lists, placement.starts)})
        writer.publish()
    return (base, *runs, IndexFile.written(store.path, name, start, store.rows))
