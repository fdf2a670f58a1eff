"""Building and maintaining a datastore together with its index, as the command line does."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from knnlm.choices import IndexKind, parse_choice
from knnlm.datastore import compaction, verification
from knnlm.datastore.append import append_documents
from knnlm.datastore.catalog import catalog_exists
from knnlm.datastore.compaction import Compaction
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.datastore.verification import Verification
from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.index.policy import build_index, keep_index
from knnlm.model.language_model import LanguageModel
from knnlm.progress import SILENT, Progress
from knnlm.text.documents import Document
from knnlm.text.sources import as_documents
from knnlm.tuning.upkeep import keep_tuned
from knnlm.workers.opening import open_makers
from knnlm.workers.pool import LEASE_SECONDS


def build(
    path: str | Path,
    lm: LanguageModel | str | Path,
    documents: Iterable[Document] | str | Path | Sequence[str | Path],
    *,
    window: int | None = None,
    context: int | None = None,
    boundary: str | None = None,
    control_tokens: bool | None = None,
    key_dtype: str | None = None,
    max_entries: int | None = None,
    index: str | None = None,
    sync: bool = False,
    tune: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    lease: float = LEASE_SECONDS,
    progress: Progress = SILENT,
) -> Datastore:
    """Store every token of `documents` with the key that preceded it, and build the index.

    Creates the datastore, extends it, or resumes an interrupted build after its last committed
    shard. A document (of the same full path, or row of it) that is stored with the same text is
    skipped; if its text changed, it replaces its old version (see `changes`). Where a text breaks
    off, whole documents before it are stored and indexed; the error is raised.

    path: the datastore's folder, made if missing. documents: or sources for `read_documents`.
    lm: a language model, or its name or path, loaded with an existing datastore's key and dtype.
    window, context, boundary, control_tokens: see `Windowing`; by default 1,024 positions (or all
        that the model has), a quarter of them context; for an existing datastore, its own.
    key_dtype: of the keys on disk, "float16" (default), "bfloat16" or "float32".
    max_entries: stop at the last whole window that leaves the datastore at most this many rows.
    index: see `IndexKind`; by default as before, at first "auto". "faiss": see `build_index`.
    sync: forget documents that are gone from the given folders; rows gone from a file always are.
    tune: tune it on its own text, if it is time to; see `keep_tuned`.
    workers, ray, lease: how many processes read the keys, on the Ray cluster of this address, or
        None: here; a worker that is silent for `lease` seconds loses its work. docs/scaling.md

    In a stream with context, the first block, which has none, is read but not stored. Raises
    InvalidArgumentError, DatastoreMismatchError, DatastoreLockedError, WorkerError,
    DatastoreWriteError, NonFiniteKeysError, and those of reading text and of loading the model.
    """
    _check_index(index)
    given, model = as_documents(documents, progress), _load(lm, Path(path))
    with _keeping_index(Path(path), index, model, progress) as renew:
        with open_makers(model, workers, ray, lease) as maker:
            store = append_documents(
                path,
                model,
                given,
                window=window,
                context=context,
                boundary=boundary,
                control_tokens=control_tokens,
                key_dtype=key_dtype,
                max_entries=max_entries,
                sync=sync,
                maker=maker,
                progress=progress,
            )
        renew(store)
    if tune:
        keep_tuned(store, model, progress)
    return store


@contextmanager
def _keeping_index(
    path: Path, index: str | None, model: LanguageModel, progress: Progress
) -> Iterator[Callable[[Datastore], None]]:
    """Yield what renews the index; at a text that cannot be read, what came before it gets one."""

    def renew(store: Datastore) -> None:
        if index is None:
            keep_index(store, device=str(model.device), progress=progress)
        else:
            build_index(store, index, device=str(model.device), progress=progress)

    try:
        yield renew
    except InvalidTextError:  # what came before it is stored, and has to be found
        if catalog_exists(path):
            renew(Datastore(path))
        raise


def compact(store: Datastore | str | Path, progress: Progress = SILENT) -> Compaction:
    """Remove the entries of forgotten documents from the disk, and renew the index.

    Raises DatastoreLockedError, DatastoreWriteError.
    """
    opened = open_datastore(store)
    removed = compaction.compact(opened, progress)
    keep_index(opened, progress=progress)
    return removed


def verify(store: Datastore | str | Path, progress: Progress = SILENT) -> Verification:
    """Reread every byte against its checksum, and check that rows and documents fit together."""
    return verification.verify(open_datastore(store), progress)


def _check_index(index: str | None) -> None:
    if index is not None and parse_choice(IndexKind, "index", index) is IndexKind.faiss:
        raise InvalidArgumentError(
            "index faiss needs a factory: build without it, then run build_index(store, 'faiss', "
            "factory='IVF1024,Flat') or knnlm index --kind faiss --factory IVF1024,Flat"
        )


def _load(lm: LanguageModel | str | Path, path: Path) -> LanguageModel:
    if isinstance(lm, LanguageModel):
        return lm
    if not isinstance(lm, str | Path):
        raise InvalidArgumentError(
            "lm must be a LanguageModel, or the name or path of one, got "
            f"{type(lm).__name__}: wrap a transformers model and its tokenizer in LanguageModel"
        )
    if catalog_exists(path):
        return Datastore(path).load_model(str(lm))
    return LanguageModel.load(lm)
