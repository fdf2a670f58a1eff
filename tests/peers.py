"""Datastores as other tools write them, byte for byte, written without knnlm's own exporters."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from knnlm.model.language_model import LanguageModel

MODEL_TYPE = "llama"


def knn_transformers_rows(
    lm: LanguageModel, groups: Sequence[Sequence[int]], block: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys and values that knn-transformers' KNNSaver keeps of some groups of tokens.

    Each group (of 1,000 texts there) is cut into blocks of at most `block` tokens, of which the
    last `stride` have labels; the key of a label is the hidden state of the token before it.
    """
    keys, values = [], []
    for tokens in groups:
        total = len(tokens) // block * block if len(tokens) >= block else len(tokens)
        for start in range(0, total, stride):
            begin, end = max(start + stride - block, 0), min(start + stride, total)
            ids = list(tokens[begin:end])
            labels = [-100] * (len(ids) - (end - start)) + ids[len(ids) - (end - start) :]
            captured = lm.keys(torch.tensor([ids]))[0, :-1]
            shifted = torch.tensor(labels[1:])
            keys.append(captured[shifted != -100])
            values.append(shifted[shifted != -100])
    return (
        torch.cat(keys).numpy().astype(np.float16),
        torch.cat(values)[:, None].numpy().astype(np.int32),
    )


def write_knn_transformers(folder: Path, keys: np.ndarray, values: np.ndarray) -> None:
    """Write `dstore_{model_type}_{N}_{dim}_keys.npy` and `…_vals.npy`: memmaps without a header."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, dimension = keys.shape
    prefix = f"{folder}/dstore_{MODEL_TYPE}_{rows}_{dimension}"
    kept = np.memmap(f"{prefix}_keys.npy", dtype=np.float16, mode="w+", shape=(rows, dimension))
    kept[:] = keys
    kept.flush()
    kept = np.memmap(f"{prefix}_vals.npy", dtype=np.int32, mode="w+", shape=(rows, 1))
    kept[:] = values.reshape(-1, 1)
    kept.flush()


def write_original(
    folder: Path, keys: np.ndarray, values: np.ndarray, key_dtype: type, value_dtype: type
) -> None:
    """Write `dstore_keys.npy` and `dstore_vals.npy`: memmaps without a header or a size."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array, dtype in (
        ("keys", keys, key_dtype),
        ("vals", values.reshape(-1, 1), value_dtype),
    ):
        kept = np.memmap(folder / f"dstore_{name}.npy", dtype=dtype, mode="w+", shape=array.shape)
        kept[:] = array.astype(dtype)
        kept.flush()


def write_knn_box(folder: Path, keys: np.ndarray, values: np.ndarray) -> None:
    """Write `keys.npy` and `vals.npy` without a header, and `config.json` with their shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {}
    for name, array in (("keys", keys), ("vals", values.reshape(-1).astype(np.int64))):
        kept = np.memmap(folder / f"{name}.npy", dtype=array.dtype, mode="w+", shape=array.shape)
        kept[:] = array
        kept.flush()
        kind = "<class 'int'>" if name == "vals" else f"<class 'numpy.{array.dtype}'>"
        infos[name] = {"name": name, "shape": list(array.shape), "dtype": kind}
    config = {"data_list": list(infos), "data_infos": infos}
    (folder / "config.json").write_text(json.dumps(config, indent=6))


def write_arrow(
    path: Path, keys: np.ndarray, values: np.ndarray, batch: int, *, footer: bool = False
) -> None:
    """Write a table of Arrow, as a stream: `keys`, lists of float16, and `vals`, int32."""
    import pyarrow as pa

    dimension = keys.shape[1]
    kind = pa.list_(pa.float16(), dimension)
    schema = pa.schema([pa.field("keys", kind), pa.field("vals", pa.int32())])
    new = pa.ipc.new_file if footer else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, schema) as writer:
        for start in range(0, len(keys), batch):
            some = slice(start, start + batch)
            columns = [
                pa.array(list(keys[some]), type=kind),
                pa.array(values.reshape(-1)[some], type=pa.int32()),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
