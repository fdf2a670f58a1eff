"""A share of a datastore, open in the states that clients ask for.

Knows no Ray: an actor is one of these, somewhere.
"""

import threading
from pathlib import Path
from typing import NamedTuple

import torch

from knnlm.choices import IndexKind
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.stored_index import stored_index
from knnlm.errors import InvalidArgumentError
from knnlm.index.cluster.copying import update_copy
from knnlm.index.cluster.states import State, state_of
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf.index import IVFIndex
from knnlm.index.share import Share

_STATES = 2  # kept open: a reader's state is still searched after the next change
_MANY_QUERIES = 64  # to prepare for: they are searched by other code than a few


class Held(NamedTuple):
    """A state that is open, and how many live entries of it the share has.

    state: the newest one of the share's datastore, where that is another than the one wanted;
    then entries is None.
    """

    state: State
    entries: int | None


class ShareSearcher:
    """One share of a datastore, open in the last states that clients asked for.

    path: the datastore's folder. copy_to: search a copy in this folder, which follows the original.

    Threads may search while another opens the next state; an index is searched by one at a time.
    """

    def __init__(self, path: Path, share: Share, copy_to: Path | None = None) -> None:
        self._path, self._share, self._copy_to = path, share, copy_to
        self._open: dict[State, tuple[Held, IVFIndex | ExactIndex]] = {}
        self._opening = threading.Lock()

    @property
    def newest(self) -> Held | None:
        """The state that was opened last, None before the first."""
        return next((held for held, _ in reversed([*self._open.values()])), None)

    def hold(self, wanted: State | None = None) -> Held:
        """Open the wanted state, if the datastore is in that state; None: whichever it is in.

        Raises what opening a datastore and its index does.
        """
        return self.opened(wanted)[0]

    def opened(self, wanted: State | None) -> tuple[Held, IVFIndex | ExactIndex | None]:
        """Return what `hold` does, and the share's index in the wanted state, None in another."""
        if wanted is not None and (opened := self._open.get(wanted)) is not None:
            return opened
        with self._opening:
            newest, store = self._newest()
            if wanted not in (None, newest):
                return Held(newest, None), None
            if newest not in self._open:
                index = open_share(store, self._share)
                if state_of(store) != newest:  # another process has replaced the index meanwhile
                    return Held(state_of(store), None), None
                _warm_up(index)
                held = Held(newest, index.entries)
                latest = [*self._open.items()][1 - _STATES :]
                self._open = {**dict(latest), newest: (held, index)}
            return self._open[newest]

    def _newest(self) -> tuple[State, Datastore]:
        path = self._path
        if self._copy_to is not None:
            update_copy(path, self._copy_to)
            path = self._copy_to
        store = Datastore(path)
        return state_of(store), store


def open_share(store: Datastore, share: Share) -> IVFIndex | ExactIndex:
    """Open a share of a datastore's index; exact where a compaction has left the index behind.

    Raises InvalidArgumentError for an index that cannot be shared.
    """
    stored = stored_index(store.catalog)
    kind = IndexKind(stored.kind)
    if kind is IndexKind.faiss:
        raise InvalidArgumentError(
            f"{store.path} must have an index that can be shared, of kind ivf, compressed or "
            f"exact, got kind {kind}: run knnlm index {store.path}"
        )
    if kind is IndexKind.exact or stored.numbering != store.numbering:
        first, stop = share.edges(store.rows)
        return ExactIndex(store, first_row=first, stop_row=stop)
    return IVFIndex(store, share=share)


def _warm_up(index: IVFIndex | ExactIndex) -> None:
    """Read and compile now what the first search would wait for."""
    for count in (1, _MANY_QUERIES):
        index.search(torch.zeros(count, index.store.settings.dimension), 1)
