"""The Ray actor: a share's searcher behind methods that take and return plain arrays.

Knows no Ray either, which makes an actor of this class. What it returns is small beside the arrays:
a search is one call with one array, and its answer two.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm.index.cluster.searcher import Held, ShareSearcher
from knnlm.index.cluster.states import State
from knnlm.index.share import Share

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Squared distances and rows, [query, k]."""


class ActorSettings(NamedTuple):
    """What an actor is started with. threads: for its searches. See `ShareSearcher`."""

    path: str
    share: int
    of: int
    threads: int
    copy_to: str | None


class ShareActor:
    """One share of a datastore on one machine. `search` is called by one thread at a time."""

    def __init__(self, settings: ActorSettings) -> None:
        torch.set_num_threads(settings.threads)
        copy_to = None if settings.copy_to is None else Path(settings.copy_to)
        share = Share(settings.share, settings.of)
        self._searcher = ShareSearcher(Path(settings.path), share, copy_to)
        self._searches = 0

    def hold(self, wanted: State | None) -> Held:
        """See `ShareSearcher.hold`."""
        return self._searcher.hold(wanted)

    def search(self, asked: tuple[State, NDArray[np.float32], int]) -> tuple[Held, Arrays | None]:
        """Search for some queries [query, dim] and k; see `ShareSearcher.search`."""
        state, queries, k = asked
        found = self._searcher.search(state, torch.from_numpy(np.array(queries)), k)
        self._searches += 1
        if found.neighbors is None:
            return found.held, None
        nearest = found.neighbors
        return found.held, (nearest.squared_distances.numpy(), nearest.rows.numpy())

    def describe(self) -> dict[str, Any]:
        """Return what `knnlm cluster status` shows; opens nothing."""
        held = self._searcher.newest
        return {
            "host": os.uname().nodename,
            "process": os.getpid(),
            "entries": None if held is None else held.entries,
            "generation": None if held is None else held.state.generation,
            "searches": self._searches,
            "resident_bytes": _resident_bytes(),
        }


def _resident_bytes() -> int | None:
    """Return how much memory this process has, mapped files included; None where unknown."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
