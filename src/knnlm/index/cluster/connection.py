"""The connection to Ray and the actors of a datastore. Ray is imported here and nowhere else.

Knows what an actor is called; does not know what it is asked.
"""

import logging
import socket
from typing import Any

from knnlm.datastore.stored_cluster import StoredCluster
from knnlm.errors import ClusterError, import_optional
from knnlm.index.cluster.actor import ActorSettings, ShareActor
from knnlm.index.cluster.server import Endpoint

_CONNECT_SECONDS = 5.0
_FIND_SECONDS = 30.0  # for an actor to say where it listens; one that is restarted needs some


def connect(address: str) -> Any:
    """Return the module `ray`, connected to a Ray cluster.

    address: "auto" for the cluster of this machine, HOST:PORT, or ray://HOST:PORT. Raises
    ClusterError if it cannot be reached, or if this process is connected to another one, and
    MissingDependencyError.
    """
    ray = import_optional("ray", "searching on a cluster", "ray")
    if ray.is_initialized():
        connected = address_of(ray)
        if address not in ("auto", connected) and not address.startswith("ray://"):
            raise ClusterError(
                f"this process is connected to the Ray cluster at {connected}, not to {address}: "
                "use another process, or call ray.shutdown() first"
            )
        return ray
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds, by the version of Ray
        raise _unreachable(address, error) from error
    return ray


def address_of(ray: Any) -> str:
    """Return the address of the Ray cluster that this process is connected to."""
    return str(ray.get_runtime_context().gcs_address)


def start_actor(
    ray: Any, cluster: StoredCluster, replica: int, node: str, settings: ActorSettings
) -> Any:
    """Start an actor, on a node while that lives; it outlives this process."""
    affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
    options = ray.remote(ShareActor).options(
        name=_name(settings.share, replica),
        namespace=cluster.namespace,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        scheduling_strategy=affinity,
    )
    return options.remote(settings)


def find_actor(ray: Any, cluster: StoredCluster, share: int, replica: int) -> Any:
    """Return a running or restarting actor, None where there is none."""
    try:
        return ray.get_actor(_name(share, replica), namespace=cluster.namespace)
    except ValueError:
        return None


def endpoint_of(ray: Any, actor: Any) -> Endpoint:
    """Return where an actor listens, when it is running.

    Raises ConnectionError where there is none any more, or none for long.
    """
    if not ray.is_initialized():  # or Ray would start a cluster of its own
        raise ConnectionError("this process has left its Ray cluster")
    try:
        found: Endpoint = ray.get(actor.endpoint.remote(), timeout=_FIND_SECONDS)
    except Exception as error:  # of many kinds, by the version of Ray
        raise ConnectionError("its actor is not running, or not yet again") from error
    return found


def _name(share: int, replica: int) -> str:
    return f"share-{share}-replica-{replica}"


def _check_reachable(address: str) -> None:
    """Refuse at once, where Ray would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # a name that Ray knows, such as auto
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> ClusterError:
    reason = "".join(str(error).splitlines()[:1])[:200]
    return ClusterError(
        f"no Ray cluster answers at {address} ({reason}); start one: ray start --head, and on "
        "every other machine: ray start --address HOST:6379"
    )
