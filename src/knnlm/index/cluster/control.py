"""Starting, showing and stopping the actors that search a datastore."""

import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knnlm.datastore.datastore import Datastore, open_datastore
from knnlm.datastore.stored_cluster import StoredCluster, store_cluster, stored_cluster
from knnlm.errors import ClusterError, InvalidArgumentError
from knnlm.index.cluster.actor import ActorSettings
from knnlm.index.cluster.connection import address_of, connect, find_actor, start_actor
from knnlm.index.cluster.searcher import Held
from knnlm.index.cluster.states import state_of
from knnlm.progress import SILENT, Progress
from knnlm.rules import check_positive_seconds, check_whole

_LOG = logging.getLogger(__name__)
_DESCRIBE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ActorReport:
    """An actor, as `knnlm cluster status` shows it.

    host, process: where it runs. entries: live ones in its share. generation: of the datastore's
    state that it opened last. searches: since it was started last. resident_bytes: of the
    process's memory, mapped files included. All are None where it does not answer, entries and
    generation also before it has opened a state.
    """

    share: int
    replica: int
    host: str | None = None
    process: int | None = None
    entries: int | None = None
    generation: int | None = None
    searches: int | None = None
    resident_bytes: int | None = None

    @property
    def answers(self) -> bool:
        """Whether the actor answered."""
        return self.process is not None


def start_cluster(
    store: Datastore | str | Path,
    *,
    address: str = "auto",
    shares: int | None = None,
    replicas: int = 1,
    deadline_seconds: float = 5.0,
    threads: int | None = None,
    copy_to: str | Path | None = None,
    progress: Progress = SILENT,
) -> StoredCluster:
    """Have a datastore searched by actors on the machines of a Ray cluster from now on.

    Each share of the entries is opened by as many actors as there are replicas, on different
    machines as far as there are enough. The datastore's folder must have the same path on every
    machine. When all actors have opened their shares, the cluster is recorded in the catalog, and
    `open_index` uses it.

    address: "auto" for the Ray cluster of this machine, HOST:PORT, or ray://HOST:PORT. shares: by
    default one for each machine. deadline_seconds: in which a request of up to 16 queries must be
    answered; a larger one has proportionally more. threads: of each actor; by default a machine's
    cores, divided among its actors. copy_to: a folder on each machine, for a copy of the datastore
    that its actors read instead, and that follows the original.

    Raises InvalidArgumentError, ClusterError, MissingDependencyError, DatastoreLockedError,
    DatastoreWriteError, and what opening the datastore and its index does.
    """
    store = open_datastore(store)
    deadline_seconds = check_positive_seconds("deadline_seconds", deadline_seconds)
    threads = None if threads is None else check_whole("threads", threads)
    if stored_cluster(store.catalog) is not None:
        raise _has_cluster(store)
    ray = connect(address)
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"])
    cluster = StoredCluster(
        address if address.startswith("ray://") else address_of(ray),
        f"knnlm-{uuid.uuid4().hex}",
        len(nodes) if shares is None else check_whole("shares", shares),
        check_whole("replicas", replicas),
        deadline_seconds,
        is_open=False,
    )
    copied = None if copy_to is None else str(Path(copy_to).resolve())
    settings = ActorSettings(str(store.path.resolve()), 0, cluster.shares, threads or 0, copied)
    _record(store, None, cluster)  # first, so that nothing runs that `stop` does not know of
    actors: list[Any] = []
    try:
        for started in _start_actors(ray, cluster, nodes, settings):
            actors.append(started)
        _wait_until_open(ray, store, actors, progress)
        is_open = replace(cluster, is_open=True)
        _record(store, cluster, is_open)
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        with suppress(InvalidArgumentError):  # it was stopped meanwhile
            _record(store, cluster, None)
        raise
    return is_open


def _record(store: Datastore, present: StoredCluster | None, new: StoredCluster | None) -> None:
    """Record a cluster in the place of the one that is recorded at present.

    Raises InvalidArgumentError where that is another.
    """
    with store.writer() as catalog:
        if stored_cluster(catalog) != present:
            raise _has_cluster(store) if present is None else _was_stopped(store)
        with catalog.transaction(entries_change=False):
            store_cluster(catalog, new)


def _was_stopped(store: Datastore) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the cluster of {store.path} was stopped while it was started: start it again"
    )


def _has_cluster(store: Datastore) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{store.path} has a cluster already, or one whose start was interrupted: knnlm cluster "
        f"stop {store.path} ends it"
    )


def _start_actors(
    ray: Any, cluster: StoredCluster, nodes: Sequence[dict[str, Any]], settings: ActorSettings
) -> Iterator[Any]:
    """Start all actors, on the nodes in turn, so that replicas of a share are on different ones.

    settings: of all actors; threads: 0 for a node's cores divided among its actors.
    """
    per_node = -(-len(cluster.actors) // len(nodes))
    for share, replica in cluster.actors:
        node = nodes[(share + replica) % len(nodes)]
        cores = int(node["Resources"].get("CPU", 1))
        threads = settings.threads or max(1, cores // per_node)
        own = settings._replace(share=share, threads=threads)
        yield start_actor(ray, cluster, replica, node["NodeID"], own)


def _wait_until_open(ray: Any, store: Datastore, actors: Sequence[Any], progress: Progress) -> None:
    state = state_of(store)
    opening = {actor.hold.remote(state) for actor in actors}
    with progress.task("open the shares", len(actors), "actors") as advance:
        while opening:
            for future in ray.wait([*opening], timeout=1.0)[0]:
                held = _opened(ray, future)
                if held.state != state:
                    raise ClusterError(
                        f"{store.path} was changed meanwhile, or is another datastore on an "
                        "actor's machine: start the cluster again"
                    )
                opening.remove(future)
                advance(1)


def _opened(ray: Any, future: Any) -> Held:
    try:
        held: Held = ray.get(future)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Exception):
            raise cause from error
        reason = "".join(str(error).splitlines()[:1])[:200]
        raise ClusterError(f"an actor could not be started ({reason}): see ray logs") from error
    return held


def cluster_status(store: Datastore | str | Path) -> tuple[StoredCluster, list[ActorReport]]:
    """Return the cluster that searches a datastore, and what each actor says of itself.

    Raises InvalidArgumentError where there is none, ClusterError and MissingDependencyError.
    """
    cluster = _recorded(open_datastore(store))
    ray = connect(cluster.address)
    asked = {}
    for share, replica in cluster.actors:
        actor = find_actor(ray, cluster, share, replica)
        if actor is not None:
            asked[share, replica] = actor.describe.remote()
    ready = set(_ready(ray, [*asked.values()], _DESCRIBE_SECONDS))
    reports = []
    for place in cluster.actors:
        facts: dict[str, Any] = {}
        if asked.get(place) in ready:
            try:
                facts = ray.get(asked[place])
            except ray.exceptions.RayError:  # it has just died
                facts = {}
        reports.append(ActorReport(*place, **facts))
    return cluster, reports


def _ready(ray: Any, futures: Sequence[Any], seconds: float) -> Sequence[Any]:
    if not futures:
        return []
    ready: Sequence[Any] = ray.wait(futures, num_returns=len(futures), timeout=seconds)[0]
    return ready


def stop_cluster(store: Datastore | str | Path) -> int:
    """End a datastore's actors; from now on it is searched in the process that opens it.

    Returns how many actors were ended. The record goes even where the Ray cluster cannot be
    reached, because it is gone. Raises InvalidArgumentError where there is no cluster,
    DatastoreLockedError and DatastoreWriteError.
    """
    store = open_datastore(store)
    cluster = _recorded(store)
    _record(store, cluster, None)
    try:
        ray = connect(cluster.address)
    except ClusterError:
        _LOG.warning(
            "the Ray cluster at %s cannot be reached from here: where it still runs, so do the "
            "actors of %s, until ray stop",
            cluster.address,
            store.path,
        )
        return 0
    actors = [find_actor(ray, cluster, *place) for place in cluster.actors]
    running = [actor for actor in actors if actor is not None]
    for actor in running:
        ray.kill(actor)
    return len(running)


def _recorded(store: Datastore) -> StoredCluster:
    cluster = stored_cluster(store.catalog)
    if cluster is None:
        raise InvalidArgumentError(
            f"{store.path} has no cluster: knnlm cluster start {store.path} starts one"
        )
    return cluster
