"""A datastore of given keys, for measuring searches; its values mean nothing."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm.datastore.catalog import Catalog, Settings, StoredShard
from knnlm.datastore.datastore import SHARDS, Datastore
from knnlm.datastore.shards import write_shard


def make_store(folder: Path, blocks: Iterable[NDArray[np.float16]]) -> Datastore:
    """Make a datastore that holds blocks of keys, a shard each, in one document."""
    catalog = None
    rows = 0
    (folder / SHARDS).mkdir(parents=True)
    for block in blocks:
        if catalog is None:
            settings = Settings(
                "given keys", None, "float32", "", "", 1, 0, "ffn_input", block.shape[1],
                "float16", 1, 0, "document",
            )  # fmt: skip
            catalog = Catalog.create(folder, settings)
        keys = torch.from_numpy(np.array(block))
        values = torch.zeros(len(keys), dtype=torch.int32)
        file = write_shard(folder / SHARDS, catalog.next_shard_name(), keys, values)
        with catalog.transaction():
            catalog.add_shard(StoredShard(rows, file))
        rows += len(keys)
    assert catalog is not None, "no keys"
    with catalog.transaction():
        document = catalog.add_document("keys", "", 0)
        catalog.extend_document(document, rows, rows, True)
    catalog.close()
    return Datastore(folder)
