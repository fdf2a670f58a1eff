"""The facts about a datastore that `knnlm info` shows."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any


def read_facts(path: Path) -> dict[str, Any]:
    """Return what a datastore holds and how it was made, as plain values."""
    from knnlm.datastore.datastore import Datastore
    from knnlm.index.policy import describe_index

    with closing(Datastore(path)) as store:
        documents = store.documents()
        parameters = store.parameters
        return {
            "path": str(store.path),
            "entries": len(store),
            "forgotten_entries": store.forgotten_rows,
            "documents": len(documents),
            "incomplete_documents": [d.name for d in documents if not d.complete],
            "shards": len(store.shards),
            "size_bytes": sum(shard.file.size_bytes for shard in store.shards),
            "generation": store.generation,
            "index": describe_index(store),
            "settings": asdict(store.settings),
            "parameters": None if parameters is None else asdict(parameters),
            "tuning": store.tuning,
        }
