"""Rows appended since an index was built, in files of their own next to the index.

So opening an index encodes nothing again. A file holds a run of rows, list by list, coded like the
index's own; its name says which rows. It is written under a temporary name and published before the
files that it replaces are removed, and a reader takes the longest file that fits: whatever a crash
leaves is correct.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, writing
from knnlm.errors import DatastoreCorruptError
from knnlm.index.ivf.file import ArrayWriter, read_arrays
from knnlm.index.ivf.lists import Lists, place_rows
from knnlm.index.ivf.parts import Part, planned_part, write_part
from knnlm.progress import Progress

_NAME = re.compile(r"ivf-(\d+)-(\d+)\.safetensors")
_GATHERED = 8  # a run is written again once the rows after it are an eighth of its own


@dataclass(frozen=True, slots=True)
class Run:
    """The rows first … stop − 1, coded."""

    first: int
    stop: int
    part: Part


def identity(lists: Lists, numbering: int) -> str:
    """Return a digest that two files share if, and only if, their codes and rows go together."""
    digest = hashlib.sha256(f"{lists.key_dtype} {numbering}".encode())
    for array in lists.arrays().values():
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def read_runs(folder: Path, wanted: str, first: int, rows: int) -> list[Run]:
    """Map the files that hold the rows from `first` to at most `rows`; ascending, without gaps.

    wanted: the identity that they must have. Raises DatastoreCorruptError.
    """
    runs: list[Run] = []
    passed_over: set[Path] = set()
    while True:
        start = runs[-1].stop if runs else first
        stops = {
            stop: path
            for path, (begin, stop) in _files(folder).items()
            if begin == start and stop <= rows and path not in passed_over
        }
        if not stops:
            return runs
        path = stops[max(stops)]
        try:
            metadata, arrays = read_arrays(path)
        except DatastoreCorruptError:
            if path.exists():
                raise
            continue  # replaced by a longer one since the folder was listed
        if metadata.get("identity") == wanted:
            runs.append(Run(start, max(stops), Part.from_arrays(arrays)))
        else:
            passed_over.add(path)


def write_run(store: Datastore, folder: Path, lists: Lists, first: int, progress: Progress) -> None:
    """Write the rows that no file holds yet, together with the last runs where those are short.

    first: the first row that the index itself does not hold. Raises DatastoreWriteError.
    """
    own_identity = identity(lists, store.numbering)
    written = read_runs(folder, own_identity, first, store.rows)
    runs = [(run.first, run.stop) for run in written]
    start = runs[-1][1] if runs else first
    if start < store.rows:
        while runs and start - runs[-1][0] <= _GATHERED * (store.rows - start):
            start = runs.pop()[0]
        placement = place_rows(store, lists, start, progress)
        name = f"ivf-{start:012d}-{store.rows:012d}.safetensors"
        planned = planned_part(len(placement.rows), lists)
        with ArrayWriter(folder / name, planned.arrays()) as writer:
            write_part(writer, store, lists, placement, progress)
            writer.write_header({"identity": own_identity})
            writer.publish()
        runs.append((start, store.rows))
    _remove(folder, set(runs))


def remove_runs(folder: Path) -> None:
    """Remove all files of appended rows, once the index itself holds those rows."""
    _remove(folder, set())


def _remove(folder: Path, kept: set[tuple[int, int]]) -> None:
    """Remove the files of other rows, and temporary files that a killed writer left."""
    with writing(folder):
        for path, rows in _files(folder).items():
            if rows not in kept:
                path.unlink(missing_ok=True)
        for path in folder.glob("ivf-*" + ASIDE):
            path.unlink()


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the first row and the stop of every file, by its name."""
    matches = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("ivf-*"))
    return {path: (int(match[1]), int(match[2])) for path, match in matches if match}
