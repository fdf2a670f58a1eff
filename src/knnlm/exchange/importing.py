"""Importing another tool's datastore: checked, proved, copied aside, visible only when whole."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from knnlm.choices import ArrayFormat, Boundary, Key, KeyDtype, parse_choice
from knnlm.datastore.catalog import Settings
from knnlm.datastore.create import model_settings
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.datastore.origin import read_origin, store_origin
from knnlm.errors import InvalidArgumentError
from knnlm.exchange.checking import check_new_folder, check_values
from knnlm.exchange.entries import StoredEntries
from knnlm.exchange.files import find_files
from knnlm.exchange.manifest import cut_documents, read_documents, read_manifest
from knnlm.exchange.proof import Proof, prove
from knnlm.exchange.staging import Staged, write_aside
from knnlm.index.policy import keep_index
from knnlm.model.language_model import LanguageModel
from knnlm.progress import SILENT, Progress
from knnlm.rules import LARGEST, check_whole
from knnlm.text.documents import check_utf8
from knnlm.text.windows import Windowing, choose_windowing

# how each tool reads by default; its last position of a block predicts nothing and is not counted
_WINDOWINGS = {
    ArrayFormat.original: Windowing(3072, 1536, Boundary.stream),
    ArrayFormat.knn_transformers: Windowing(1023, 511, Boundary.stream),
    ArrayFormat.arrow: Windowing(1023, 511, Boundary.stream),
}


def import_datastore(
    path: str | Path,
    files: Sequence[str | Path] | str | Path,
    lm: LanguageModel | str | Path | None = None,
    *,
    source: str,
    key: str | None = None,
    dimension: int | None = None,
    max_entries: int | None = None,
    cut_after: int | None = None,
    name: str | None = None,
    window: int | None = None,
    context: int | None = None,
    boundary: str | None = None,
    key_dtype: str | None = None,
    unverified: bool = False,
    progress: Progress = SILENT,
) -> Datastore:
    """Make a datastore of the keys and values that another tool computed, and build its index.

    The values are the text: a sample of it is read again with the model, in the windows given, and
    the keys have to agree before anything is copied. Entries keep their order. The datastore
    appears when it is whole; an import that was killed is resumed by the same call.

    path: of a folder that does not exist. files: the files of keys and values, or their folder.
    lm: the model that computed the keys, or its name or path; by default the one that an export of
        knnlm names. unverified: do not load it and prove nothing; every report says so until
        `prove_import` has.
    source: see `ArrayFormat`. key: see `Key`; by default the model's, or "ffn_input".
    dimension: of a key, for raw files that neither name nor model tells it of.
    max_entries: take only so many from the beginning, where the rest was never written.
    cut_after: a token id that ends a document; by default everything is one document.
    name: of the document, and of documents with their number; by default the file's.
    window, context, boundary: see `Windowing`; how the tool read, and how text is read from now on.
    key_dtype: of the keys on disk, see `KeyDtype`; by default as in the files.

    Raises DatastoreNotFoundError for missing files, DatastoreCorruptError for sizes that fit no
    shape, ids outside the vocabulary and rows that were never written, NonFiniteKeysError,
    DatastoreMismatchError for keys that are not the model's, InvalidArgumentError,
    DatastoreLockedError, DatastoreWriteError, and the errors of loading the model.
    """
    windows = {"window": window, "context": context, "boundary": boundary}
    chosen = parse_choice(ArrayFormat, "source", source)
    request = _Request(
        chosen, lm, key, dimension, max_entries, cut_after, name, windows, key_dtype, unverified
    )
    given = [files] if isinstance(files, str | Path) else files
    return _import(Path(path), given, request, progress)


@dataclass(frozen=True, slots=True)
class _Request:
    """What `import_datastore` was asked for; windows: window, context and boundary."""

    format: ArrayFormat
    lm: LanguageModel | str | Path | None
    key: str | None
    dimension: int | None
    max_entries: int | None
    cut_after: int | None
    name: str | None
    windows: dict[str, Any]
    key_dtype: str | None
    unverified: bool

    def __post_init__(self) -> None:
        if self.cut_after is not None:
            check_whole("cut_after", self.cut_after, least=0)
        if self.dimension is not None:
            check_whole("dimension", self.dimension)
        if self.max_entries is not None:
            check_whole("max_entries", self.max_entries, most=LARGEST)
        if self.name is not None:
            check_utf8(f"name {self.name!a}", self.name)
        if self.key_dtype is not None:
            parse_choice(KeyDtype, "key_dtype", self.key_dtype)


def _import(
    path: Path, files: Sequence[str | Path], request: _Request, progress: Progress
) -> Datastore:
    check_new_folder(path)
    found = find_files(files, request.format)
    manifest = read_manifest(found.folder)
    said: dict[str, Any] = manifest.get("settings", {})
    key = request.key or said.get("key")
    model_name, model = _model(request.lm or said.get("model"), key, request.unverified)
    entries = found.open(request.dimension or (None if model is None else model.dimension))
    rows = min(entries.rows, request.max_entries or entries.rows)
    windowing = choose_windowing(
        None if model is None else model.max_window,
        model_name,
        **_sizes(said, request),
    )
    vocab_size = None if model is None else model.vocab_size
    values = check_values(
        entries, rows, vocab_size, request.cut_after, path=found.paths[-1], progress=progress
    )
    is_listed = bool(said) and request.cut_after is None and rows == entries.rows
    documents = read_documents(found.folder, rows) if is_listed else None
    if documents is None:
        documents = cut_documents(rows, values.ends, request.name or found.paths[0].stem)
    dtype = request.key_dtype or str(entries.key_dtype).removeprefix("torch.")
    settings = _unproved_settings(
        model_name,
        key,
        values.largest + 1,
        dimension=entries.dimension,
        dtype=dtype,
        windowing=windowing,
    )
    first_block = manifest.get("first_block", _first_block(request.format, windowing))
    proof = None
    if model is not None:
        proof = prove(
            entries,
            model,
            windowing,
            documents,
            rows=rows,
            first_block=first_block,
            progress=progress,
        )
        settings = replace(settings, **model_settings(model))
    origin = {
        "format": request.format,
        "files": found.states(),
        "entries": rows,
        "cut_after": request.cut_after,
        "first_block": first_block,
        "verified": proof is not None,
        "proof": None if proof is None else asdict(proof),
    }
    staged = Staged(settings, origin, documents, rows)
    write_aside(path, staged, entries, found.paths[0], progress)
    store = Datastore(path)
    keep_index(store, device="cpu" if model is None else str(model.device), progress=progress)
    return store


def prove_import(
    store: Datastore | str | Path, lm: LanguageModel | str | Path, progress: Progress = SILENT
) -> Proof:
    """Prove a datastore that was imported unverified, and record the model that it is of.

    lm: the model, or its name or path. Raises InvalidArgumentError for a datastore that was built
    here, DatastoreMismatchError, and what loading the model does.
    """
    opened = open_datastore(store)
    origin = read_origin(opened.catalog)
    if origin is None:
        raise InvalidArgumentError(
            f"{opened.path} must have been imported to be proved, but was built from text"
        )
    model = lm if isinstance(lm, LanguageModel) else opened.load_model(lm)
    opened.check_model(model)
    documents = sorted(opened.documents(), key=lambda document: document.start)
    proof = prove(
        StoredEntries(opened),
        model,
        opened.windowing,
        documents,
        rows=opened.rows,
        first_block=origin["first_block"],
        progress=progress,
    )
    opened.settings = replace(opened.settings, **model_settings(model))
    with opened.writer() as catalog, catalog.transaction(entries_change=False):
        store_origin(catalog, origin | {"verified": True, "proof": asdict(proof)})
        catalog.set("datastore", asdict(opened.settings))
    return proof


def _model(
    given: LanguageModel | str | Path | None, key: str | None, unverified: bool
) -> tuple[str, LanguageModel | None]:
    """Return the model's name, and the model to prove the import with."""
    if given is None:
        raise InvalidArgumentError(
            "lm must be the model that computed the keys, or its name, got none: only exports of "
            "knnlm say it themselves"
        )
    if key is not None:
        parse_choice(Key, "key", key)
    if not unverified:
        model = (
            given
            if isinstance(given, LanguageModel)
            else LanguageModel.load(given, key=key or Key.ffn_input)
        )
        if key is not None and model.key != key:
            raise InvalidArgumentError(
                f"key must be {model.key}, which lm was opened with, got {key!r}: leave key out"
            )
        return model.name, model
    if isinstance(given, LanguageModel):
        return given.name, None
    if key is None:
        raise InvalidArgumentError(
            f"key must be given for an unverified import, one of {', '.join(Key)}: ffn_input is "
            "the default of most tools"
        )
    local = Path(given).expanduser()
    return str(local.absolute() if local.exists() else given), None


def _sizes(said: dict[str, Any], request: _Request) -> dict[str, Any]:
    """Return the window, context and boundary given, else those of the export or the tool."""
    given = request.windows
    known = said or asdict(_WINDOWINGS.get(request.format, Windowing(boundary=Boundary.stream)))
    sizes = {name: known[name] if given[name] is None else given[name] for name in given}
    if given["window"] is not None and given["context"] is None:
        sizes["context"] = None  # a quarter, as always
    return sizes | {"control_tokens": known.get("control_tokens", False)}


def _first_block(format_: ArrayFormat, windowing: Windowing) -> int:
    """Return the first row at which a whole block begins.

    knn-transformers' first block reads the first token, which no key precedes.
    """
    new = windowing.window - windowing.context
    shifted = format_ in (ArrayFormat.knn_transformers, ArrayFormat.arrow)
    return new - 1 if shifted else 0


def _unproved_settings(
    model: str,
    key: str | None,
    vocab_size: int,
    *,
    dimension: int,
    dtype: str,
    windowing: Windowing,
) -> Settings:
    return Settings(
        model=model,
        revision=None,
        model_dtype="auto",
        weights_fingerprint="",
        tokenizer_fingerprint="",
        vocab_size=vocab_size,
        start_token=-1,
        key=key or Key.ffn_input,
        dimension=dimension,
        key_dtype=dtype,
        window=windowing.window,
        context=windowing.context,
        boundary=windowing.boundary,
        control_tokens=windowing.control_tokens,
    )
