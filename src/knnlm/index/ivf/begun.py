"""A build that goes on after it was killed: what of it is on disk, and how far it is.

Knows files, not keys. All of it lies in the datastore's folder for an unfinished index.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.datastore.files import ASIDE, publish, sync, writing
from knnlm.datastore.unfinished import (
    discard_unfinished,
    entries_state,
    is_current,
    read_manifest,
    unfinished_folder,
    write_manifest,
)

_LEARNED = "lists.safetensors"


class Begun:
    """The state of a build: that of an earlier run if there is one of the same options.

    options: what the files depend on, besides the entries. rows, sizes, counts: the rows that are
    in buckets, the bytes of each bucket, the entries of each list. placed: how many buckets are in
    the index's file, and gone. learned: the arrays that were learned; empty until they are saved.

    Raises DatastoreWriteError.
    """

    def __init__(self, store: Datastore, options: dict[str, Any]) -> None:
        self._store_folder = store.path
        self.folder = unfinished_folder(store.path)
        self.learned: dict[str, Tensor] = {}
        manifest = read_manifest(store.path)
        if manifest is not None and self._fits(store, manifest, options):
            self.learned = self._read_learned()
        if manifest is None or not self.learned:
            discard_unfinished(store.path)
            manifest = {"rows": 0, "sizes": [], "counts": [], "placed": 0}
            with writing(self.folder):
                self.folder.mkdir(parents=True)
        self._manifest = manifest | {"options": options} | entries_state(store.catalog)
        self._thread = ThreadPoolExecutor(1, "knnlm-index")
        self._saving: Future[None] | None = None

    def _fits(self, store: Datastore, manifest: dict[str, Any], options: dict[str, Any]) -> bool:
        if not is_current(manifest, store.catalog) or manifest["options"] != options:
            return False
        return self.written.exists() or not manifest["placed"]

    def __enter__(self) -> "Begun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            discard_unfinished(self._store_folder)

    @property
    def written(self) -> Path:
        """The index's file, until it is whole."""
        return self.folder / "index.safetensors"

    @property
    def rows(self) -> int:
        """The rows that are in buckets."""
        return int(self._manifest["rows"])

    @property
    def sizes(self) -> list[int]:
        """The bytes of each bucket."""
        return list(self._manifest["sizes"])

    @property
    def counts(self) -> list[int]:
        """The entries of each list, of the rows that are in buckets."""
        return list(self._manifest["counts"])

    @property
    def placed(self) -> int:
        """How many buckets are in the index's file."""
        return int(self._manifest["placed"])

    def _read_learned(self) -> dict[str, Tensor]:
        try:
            return dict(load_file(self.folder / _LEARNED))
        except (OSError, SafetensorError):
            return {}

    def save_learned(self, arrays: dict[str, Tensor]) -> None:
        """Keep what was learned; from now on there is something to go on with."""
        self.learned = arrays
        aside = self.folder / (_LEARNED + ASIDE)
        with writing(self.folder):
            save_file(arrays, aside)
            publish(aside, self.folder / _LEARNED)
        write_manifest(self._store_folder, self._manifest)

    @property
    def is_saving(self) -> bool:
        """Whether the last `save` is under way."""
        return self._saving is not None and not self._saving.done()

    def save(self, files: Sequence[Path], done: Sequence[Path] = (), **state: Any) -> None:
        """Begin to make files durable, then record a state, then delete what is done with.

        Waits for the last one, and raises the error that it met.
        """
        self.wait()
        manifest = self._manifest = self._manifest | state

        def save() -> None:
            with writing(self.folder):
                for path in files:
                    sync(path)
                write_manifest(self._store_folder, manifest)
                for path in done:
                    path.unlink(missing_ok=True)

        self._saving = self._thread.submit(save)

    def wait(self) -> None:
        """Wait for the last `save`. Raises DatastoreWriteError."""
        if self._saving is not None:
            self._saving.result()
