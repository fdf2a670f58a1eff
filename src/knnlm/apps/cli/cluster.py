"""The command `cluster`: search a datastore on many machines."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT, amount, print_json
from knnlm.apps.cli.reports import new_table
from knnlm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knnlm.datastore.stored_cluster import StoredCluster
    from knnlm.index.cluster.control import ActorReport


class _Action(StrEnum):
    start = "start"
    status = "status"
    stop = "stop"


_What = Annotated[_Action, typer.Argument(help="start, status or stop.")]
_Address = Annotated[
    str | None,
    typer.Option(
        help="With start: the Ray cluster, as HOST:PORT or ray://HOST:PORT; by default the one "
        "that this machine belongs to."
    ),
]
_Shares = Annotated[
    int | None,
    typer.Option(
        help="With start: into how many parts the entries are divided; by default one for each "
        "machine."
    ),
]
_Replicas = Annotated[
    int | None,
    typer.Option(
        help="With start: how many actors hold each share, on different machines where there are "
        "enough; by default 1. With 2 or more, one that is late or dies is replaced by another."
    ),
]
_Deadline = Annotated[
    float | None,
    typer.Option(
        help="With start: seconds in which a search for up to 16 queries must be answered, more "
        "for more queries; by default 5."
    ),
]
_Threads = Annotated[
    int | None,
    typer.Option(
        help="With start: threads of each actor; by default a machine's cores divided among its "
        "actors."
    ),
]
_CopyTo = Annotated[
    Path | None,
    typer.Option(
        help="With start: a folder on each machine for a copy of the datastore, which its actors "
        "read instead of STORE and keep up to date."
    ),
]


def cluster(
    action: _What,
    store: options.Store,
    *,
    address: _Address = None,
    shares: _Shares = None,
    replicas: _Replicas = None,
    deadline: _Deadline = None,
    threads: _Threads = None,
    copy_to: _CopyTo = None,
    as_json: options.Json = False,
) -> None:
    """Search a datastore on the machines of a Ray cluster: start, status or stop.

    After `start`, every command that searches the datastore asks the cluster, until `stop`. STORE
    must have the same path on every machine. See docs/cluster.md.

        knnlm cluster start docs.store --shares 4 --replicas 2
    """
    given = {
        "address": address,
        "shares": shares,
        "replicas": replicas,
        "deadline_seconds": deadline,
        "threads": threads,
        "copy_to": copy_to,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if asked and action is not _Action.start:
        raise InvalidArgumentError(
            f"{next(iter(asked)).removesuffix('_seconds').replace('_', '-')} goes with start, not "
            f"with {action}: leave it out"
        )
    from knnlm.apps.cli.progress_bar import RichProgress
    from knnlm.index.cluster.control import cluster_status, start_cluster, stop_cluster

    if action is _Action.stop:
        ended = stop_cluster(store)
        if as_json:
            print_json({"actors": ended})
        else:
            OUT.print(f"ended {ended} actors; {store} is searched where it is opened")
        return
    if action is _Action.start:
        start_cluster(store, **asked, progress=RichProgress())  # type: ignore[arg-type]
    recorded, actors = cluster_status(store)
    if as_json:
        print_json(_as_dict(recorded, actors))
    else:
        _print(recorded, actors)
    if any(not actor.answers for actor in actors):
        raise typer.Exit(1)


def _as_dict(recorded: "StoredCluster", actors: "Sequence[ActorReport]") -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(recorded), "actors": [asdict(actor) for actor in actors]}


def _print(recorded: "StoredCluster", actors: "Sequence[ActorReport]") -> None:
    OUT.print(
        f"{recorded.shares} shares × {recorded.replicas} replicas at {recorded.address}, deadline "
        f"{recorded.deadline_seconds:g} s",
        soft_wrap=True,
    )
    columns = ("share", "replica", "host", "process", "entries", "generation", "searches", "memory")
    table = new_table(*columns, left="host")
    for actor in actors:
        if not actor.answers:
            table.add_row(f"{actor.share}", f"{actor.replica}", "does not answer", *[""] * 5)
            continue
        memory = actor.resident_bytes
        table.add_row(
            f"{actor.share}",
            f"{actor.replica}",
            f"{actor.host}",
            f"{actor.process}",
            "not open yet" if actor.entries is None else f"{actor.entries:,}",
            "" if actor.generation is None else f"{actor.generation}",
            f"{actor.searches:,}",
            "" if memory is None else f"{amount(memory, 'bytes')}B",
        )
    OUT.print(table)
