"""Exporting a datastore as the arrays of another tool, which appear when they are whole."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.choices import ArrayFormat, parse_choice
from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.datastore.files import publish, writing
from knnlm.datastore.origin import read_origin
from knnlm.datastore.tables import StoredDocument
from knnlm.errors import InvalidArgumentError, NonFiniteKeysError, import_optional
from knnlm.exchange.entries import block_rows, ranges
from knnlm.exchange.manifest import write_manifest
from knnlm.progress import SILENT, Progress
from knnlm.provenance import provenance

_ASIDE = ".exporting"
_LARGEST_INT16 = 32767

Block: TypeAlias = tuple[np.ndarray, np.ndarray]  # keys [rows, dimension], values [rows]


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: the files in its folder, keys before values, and their contents."""

    folder: Path
    format: str
    files: tuple[str, ...]
    entries: int
    dimension: int
    key_dtype: str
    value_dtype: str
    documents: int


def export_datastore(
    store: Datastore | str | Path,
    folder: str | Path,
    *,
    target: str = ArrayFormat.npy,
    model_type: str | None = None,
    progress: Progress = SILENT,
) -> Exported:
    """Write a datastore's keys [rows, dimension] and values [rows] as another tool keeps them.

    Entries are in the order in which they are stored, those of forgotten documents left out. Two
    files come with the arrays: knnlm.json (shapes, dtypes, settings, provenance) and
    documents.jsonl (names and rows of the documents); `import_datastore` reads them.

    folder: one that does not exist. target: see `ArrayFormat`. model_type: with knn-transformers
    and arrow, the configuration's model_type by which these tools find their files.

    Raises InvalidArgumentError, NonFiniteKeysError for keys that the format's float16 cannot hold,
    DatastoreCorruptError, DatastoreWriteError.
    """
    opened, folder = open_datastore(store), Path(folder)
    layout = _layout(opened, parse_choice(ArrayFormat, "target", target), model_type)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidArgumentError(f"folder {folder} exists already; name a new one")
    aside = folder.with_name(folder.name + _ASIDE)
    with writing(folder):
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir(parents=True)
        try:
            with progress.task("export", len(opened), "entries") as advance:
                layout.write(aside, layout, _blocks(opened, layout, advance))
            documents = list(_renumbered(opened))
            description = _description(opened, layout, len(documents))
            write_manifest(aside, description, documents)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        publish(aside, folder)
    return Exported(
        folder,
        layout.format,
        layout.files,
        layout.rows,
        layout.dimension,
        layout.key_dtype,
        layout.value_dtype,
        len(documents),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a format keeps a datastore of some shape."""

    format: ArrayFormat
    rows: int
    dimension: int
    key_dtype: str
    value_dtype: str
    files: tuple[str, ...]
    write: "Callable[[Path, _Layout, Iterator[Block]], None]"


def _layout(store: Datastore, target: ArrayFormat, model_type: str | None) -> _Layout:
    rows, settings = len(store), store.settings
    if rows == 0:
        raise InvalidArgumentError(f"{store.path} must hold entries to be exported, but is empty")
    needs_type = target in (ArrayFormat.knn_transformers, ArrayFormat.arrow)
    if needs_type != (model_type is not None):
        raise InvalidArgumentError(
            "model_type goes with knn-transformers and arrow and only with them: the model_type "
            f"in the model's config.json, such as gpt2; got {model_type!r} with {target}"
        )
    if model_type is not None and (not model_type or "/" in model_type):
        raise InvalidArgumentError(f"model_type must be part of a file's name, got {model_type!r}")
    # float32 holds every bfloat16
    own = "float16" if settings.key_dtype == "float16" else "float32"
    keys, values, names, write = {
        ArrayFormat.npy: (own, "int32", ("keys.npy", "vals.npy"), _write_npy),
        ArrayFormat.knn_box: (own, "int64", ("keys.npy", "vals.npy"), _write_knn_box),
        ArrayFormat.knn_transformers: (
            "float16",
            "int32",
            tuple(
                f"dstore_{model_type}_{rows}_{settings.dimension}_{kind}.npy"
                for kind in ("keys", "vals")
            ),
            _write_raw,
        ),
        ArrayFormat.arrow: (
            "float16",
            "int32",
            (f"dstore_{model_type}_train_{settings.dimension}.arrow",),
            _write_arrow,
        ),
        ArrayFormat.original: (own, "int64", ("dstore_keys.npy", "dstore_vals.npy"), _write_raw),
    }[target]
    if target is ArrayFormat.original and own == "float16":
        # it reads float16 keys with int16 values, and only float32 keys with wider ones
        fits = settings.vocab_size - 1 <= _LARGEST_INT16
        keys, values = ("float16", "int16") if fits else ("float32", "int64")
    return _Layout(target, rows, settings.dimension, keys, values, names, write)


def _live(store: Datastore) -> list[StoredDocument]:
    return sorted(store.documents(), key=lambda document: document.start)


def _renumbered(store: Datastore) -> Iterator[StoredDocument]:
    """Yield the documents with the rows that they have without forgotten ones."""
    start = 0
    for document in _live(store):
        stop = start + document.stop - document.start
        yield replace(document, start=start, stop=stop)
        start = stop


def _blocks(store: Datastore, layout: _Layout, advance: Callable[[float], None]) -> Iterator[Block]:
    """Yield keys and values in row order, in the dtypes of the files."""
    step = block_rows(layout.dimension, torch.float32)
    for first, last in _runs(_live(store)):
        for start, stop in ranges(first, last, step):
            rows = torch.arange(start, stop)
            yield (
                _converted(store.keys_at(rows), layout, start),
                _as_numpy(store.values[start:stop]).astype(layout.value_dtype),
            )
            advance(stop - start)


def _runs(documents: list[StoredDocument]) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that documents fill without gaps."""
    first = last = 0
    for document in documents:
        if document.start != last:
            if last > first:
                yield first, last
            first = document.start
        last = document.stop
    if last > first:
        yield first, last


def _converted(keys: Float[Tensor, "rows dim"], layout: _Layout, start: int) -> np.ndarray:
    converted = keys.to(getattr(torch, layout.key_dtype))
    if not bool((fit := converted.isfinite().all(dim=1)).all()):
        row = int((~fit).int().argmax())
        raise NonFiniteKeysError(
            f"the float16 keys of {layout.format} must hold all keys, but the key of row "
            f"{start + row} has {float(keys[row].float().abs().max()):.4g}: export it as npy"
        )
    return _as_numpy(converted)


def _as_numpy(tensor: Float[Tensor, "..."] | Int[Tensor, "..."]) -> np.ndarray:
    array: np.ndarray = tensor.numpy()
    return array


def _write_both(
    folder: Path, layout: _Layout, blocks: Iterator[Block], heads: tuple[bytes, bytes]
) -> None:
    with ExitStack() as opened:
        files: list[BinaryIO] = [
            opened.enter_context((folder / name).open("wb")) for name in layout.files
        ]
        for file, head in zip(files, heads, strict=True):
            file.write(head)
        for block in blocks:
            for file, array in zip(files, block, strict=True):
                file.write(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).data)


def _write_raw(folder: Path, layout: _Layout, blocks: Iterator[Block]) -> None:
    _write_both(folder, layout, blocks, (b"", b""))


def _write_npy(folder: Path, layout: _Layout, blocks: Iterator[Block]) -> None:
    shapes = (layout.rows, layout.dimension), (layout.rows,)
    dtypes = layout.key_dtype, layout.value_dtype
    heads = [_npy_head(dtype, shape) for dtype, shape in zip(dtypes, shapes, strict=True)]
    _write_both(folder, layout, blocks, (heads[0], heads[1]))


def _npy_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    from io import BytesIO

    head = BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, described)
    return head.getvalue()


def _write_knn_box(folder: Path, layout: _Layout, blocks: Iterator[Block]) -> None:
    _write_raw(folder, layout, blocks)
    kinds = {
        "keys": ([layout.rows, layout.dimension], f"<class 'numpy.{layout.key_dtype}'>"),
        "vals": ([layout.rows], "<class 'int'>"),
    }
    infos = {
        name: {"name": name, "shape": shape, "dtype": dtype}
        for name, (shape, dtype) in kinds.items()
    }
    config = {"data_list": list(kinds), "data_infos": infos}
    (folder / "config.json").write_text(json.dumps(config, indent=6), encoding="utf-8")


def _write_arrow(folder: Path, layout: _Layout, blocks: Iterator[Block]) -> None:
    arrow = import_optional("pyarrow", "the format arrow", "data")
    ipc = import_optional("pyarrow.ipc", "the format arrow", "data")
    kind = arrow.list_(arrow.float16(), layout.dimension)
    schema = arrow.schema([arrow.field("keys", kind), arrow.field("vals", arrow.int32())])
    with (
        arrow.OSFile(str(folder / layout.files[0]), "wb") as file,
        ipc.new_stream(file, schema) as writer,
    ):
        for keys, values in blocks:
            flat = arrow.array(keys.reshape(-1), type=arrow.float16())
            lists = arrow.FixedSizeListArray.from_arrays(flat, layout.dimension)
            columns = [lists, arrow.array(values, type=arrow.int32())]
            writer.write_batch(arrow.RecordBatch.from_arrays(columns, schema=schema))


def _description(store: Datastore, layout: _Layout, documents: int) -> dict[str, Any]:
    origin = read_origin(store.catalog)
    shapes = {"keys": [layout.rows, layout.dimension], "values": [layout.rows]}
    return {
        "format": layout.format,
        "files": list(layout.files),
        "keys": {"dtype": layout.key_dtype, "shape": shapes["keys"]},
        "values": {"dtype": layout.value_dtype, "shape": shapes["values"]},
        "byte_order": "little",
        "order": "as stored, which is that of the text; entries of forgotten documents left out",
        "documents": documents,
        "datastore": str(store.path.resolve()),
        "generation": store.generation,
        "settings": asdict(store.settings),
        "first_block": 0 if origin is None else origin["first_block"],
        "origin": origin,
        "provenance": provenance(),
    }
