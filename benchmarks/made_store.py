"""Make datastores from given keys, for benchmarks."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knnlm.datastore.catalog import SHARDS, Catalog, Settings, StoredShard
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.shards import write_shard


def write_store(
    folder: Path,
    settings: Settings,
    shards: Iterable[tuple[Tensor, Tensor]],
    documents: Sequence[int] = (),
) -> Datastore:
    """Make a datastore from shards of keys and values.

    documents: the rows of each, one after the other; read when the shards are written. What is left
    is one more.
    """
    (folder / SHARDS).mkdir(parents=True)
    catalog = Catalog.create(folder, settings)
    rows = 0
    for keys, values in shards:
        file = write_shard(folder / SHARDS, catalog.next_shard_name(), keys, values)
        with catalog.transaction():
            catalog.add_shard(StoredShard(rows, file))
        rows += len(keys)
    with catalog.transaction():
        start = 0
        for number, length in enumerate((*documents, rows - sum(documents))):
            if length:
                name = f"made-{number}"
                document = catalog.add_document(name, name, "", start)
                start += length
                catalog.extend_document(document, start, length, True)
    catalog.close()
    return Datastore(folder)


def make_store(
    folder: Path,
    dimension: int,
    blocks: Iterable[NDArray[np.float16]],
    documents: Sequence[int] = (),
) -> Datastore:
    """Make a datastore from blocks of keys, one shard each; its values are all 0.

    documents: see `write_store`.
    """
    settings = Settings(
        "given keys", None, "float32", "", "", 1, 0, "ffn_input", dimension, "float16", 1, 0,
        "document",
    )  # fmt: skip
    shards = (
        (torch.from_numpy(np.array(block)), torch.zeros(len(block), dtype=torch.int32))
        for block in blocks
    )
    return write_store(folder, settings, shards, documents)
