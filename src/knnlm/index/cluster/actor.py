"""The Ray actor: a share's searcher and what listens for its clients.

Ray starts it, starts it again, and says where it listens; searches do not pass through Ray. Of Ray
it knows the address of the machine that it is on.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from knnlm.index.cluster.searcher import Held, ShareSearcher
from knnlm.index.cluster.server import Endpoint, ShareServer
from knnlm.index.cluster.states import State
from knnlm.index.share import Share


class ActorSettings(NamedTuple):
    """What an actor is started with. threads: for its searches. See `ShareSearcher`."""

    path: str
    share: int
    of: int
    threads: int
    copy_to: str | None


class ShareActor:
    """One share of a datastore on one machine."""

    def __init__(self, settings: ActorSettings) -> None:
        import ray

        torch.set_num_threads(settings.threads)
        copy_to = None if settings.copy_to is None else Path(settings.copy_to)
        share = Share(settings.share, settings.of)
        self._searcher = ShareSearcher(Path(settings.path), share, copy_to)
        self._server = ShareServer(self._searcher, ray.util.get_node_ip_address())

    def endpoint(self) -> Endpoint:
        """Return where clients may ask for searches."""
        return self._server.endpoint

    def hold(self, wanted: State | None) -> Held:
        """See `ShareSearcher.hold`."""
        return self._searcher.hold(wanted)

    def describe(self) -> dict[str, Any]:
        """Return what `knnlm cluster status` shows; opens nothing."""
        held = self._searcher.newest
        return {
            "host": os.uname().nodename,
            "process": os.getpid(),
            "entries": None if held is None else held.entries,
            "generation": None if held is None else held.state.generation,
            "searches": self._server.searches,
            "resident_bytes": _resident_bytes(),
        }


def _resident_bytes() -> int | None:
    """Return how much memory this process has, mapped files included; None where unknown."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
