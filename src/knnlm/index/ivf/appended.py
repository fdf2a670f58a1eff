"""Rows appended since an index was built, in files of their own beside it.

So opening an index encodes nothing again. A file holds a run of rows, list by list, coded as the
index's own are; its name says which rows. It is written aside and published before those that it
replaces are removed, and a reader takes the longest that fits: whatever a crash leaves is correct.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, writing
from knnlm.errors import DatastoreCorruptError
from knnlm.index.ivf import lists as ivf_lists
from knnlm.index.ivf.file import Part, PartWriter, part_of, read_part
from knnlm.progress import Progress

_NAME = re.compile(r"ivf-(\d+)-(\d+)\.safetensors")
_GATHERED = 8  # a run is written again once as much as an eighth of it comes after it


@dataclass(frozen=True, slots=True)
class Run:
    """Rows first … stop − 1, coded."""

    first: int
    stop: int
    part: Part


def identity(lists: ivf_lists.Lists, key_dtype: torch.dtype | None, numbering: int) -> str:
    """Return what two files share if, and only if, their codes and rows go together."""
    digest = hashlib.sha256(f"{key_dtype} {numbering}".encode())
    coder = lists.coder
    for array in (lists.centroids, coder.center, coder.projection, coder.rest):
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def read_runs(folder: Path, wanted: str, first: int, rows: int) -> list[Run]:
    """Map the files that hold the rows from `first` on, as far as `rows`; ascending, no gaps.

    Raises DatastoreCorruptError.
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
            metadata, arrays = read_part(path)
        except DatastoreCorruptError:
            if path.exists():
                raise
            continue  # replaced by a longer one since the folder was listed
        if metadata.get("identity") == wanted:
            runs.append(Run(start, max(stops), part_of(arrays)))
        else:
            passed_over.add(path)


def write_run(
    store: Datastore,
    folder: Path,
    lists: ivf_lists.Lists,
    key_dtype: torch.dtype | None,
    first: int,
    progress: Progress,
) -> None:
    """Write the rows that no file holds yet, together with the last runs where those are short.

    first: the first row that the index itself does not hold. Raises DatastoreWriteError.
    """
    mark = identity(lists, key_dtype, store.numbering)
    runs = [(run.first, run.stop) for run in read_runs(folder, mark, first, store.rows)]
    start = runs[-1][1] if runs else first
    if start < store.rows:
        while runs and start - runs[-1][0] <= _GATHERED * (store.rows - start):
            start = runs.pop()[0]
        placement = ivf_lists.place_rows(store, lists, start, progress)
        name = f"ivf-{start:012d}-{store.rows:012d}.safetensors"
        arrays = ivf_lists.part_arrays(len(placement.rows), lists, key_dtype)
        with PartWriter(folder / name, arrays) as writer:
            ivf_lists.fill(writer, store, lists, placement, key_dtype, progress)
            writer.describe({"identity": mark})
            writer.publish()
        runs.append((start, store.rows))
    _remove(folder, set(runs))


def remove_runs(folder: Path) -> None:
    """Remove all files of appended rows: the index holds them itself now."""
    _remove(folder, set())


def _remove(folder: Path, kept: set[tuple[int, int]]) -> None:
    """Remove the files of other rows, and what a killed writer left."""
    with writing(folder):
        for path, rows in _files(folder).items():
            if rows not in kept:
                path.unlink(missing_ok=True)
        for path in folder.glob("ivf-*" + ASIDE):
            path.unlink()


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("ivf-*"))
    return {path: (int(match[1]), int(match[2])) for path, match in found if match}
