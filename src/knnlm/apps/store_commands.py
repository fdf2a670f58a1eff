"""The commands that look after a datastore: info, forget, compact, verify."""

from typing import Annotated

import typer

from knnlm.apps import console
from knnlm.apps.options import Json, Store


def info(
    store: Store,
    documents: Annotated[
        bool, typer.Option("--documents", help="List the documents and their entries.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a datastore holds and how it was made."""
    from knnlm.datastore.datastore import Datastore

    opened = Datastore(store)
    if as_json:
        listed = [
            {"name": d.name, "start": d.start, "stop": d.stop, "complete": d.complete}
            for d in (opened.documents() if documents else [])
        ]
        facts = console.describe(opened)
        console.print_json(facts | {"document_list": listed} if documents else facts)
        return
    console.print_store(opened)
    for document in opened.documents() if documents else []:
        console.OUT.print(f"{document.stop - document.start:>10,}  {document.name}", soft_wrap=True)


def forget(
    store: Store,
    document: Annotated[
        list[str],
        typer.Argument(
            help="Names as `knnlm info --documents` lists them, or patterns with \\* ? [ ].",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Take documents out of every answer, at once.

    Their bytes leave the disk with `knnlm compact`. A later build from a source that still holds
    a document stores it again.
    """
    from knnlm.datastore.datastore import Datastore

    forgotten = Datastore(store).forget(document)
    rows = sum(d.stop - d.start for d in forgotten)
    if as_json:
        console.print_json({"documents": [d.name for d in forgotten], "entries": rows})
    else:
        console.OUT.print(
            f"forgot {len(forgotten):,} documents with {rows:,} entries; knnlm compact {store} "
            "removes their bytes",
            soft_wrap=True,
        )


def compact(store: Store, as_json: Json = False) -> None:
    """Remove the bytes of forgotten documents from the disk."""
    import knnlm

    removed = knnlm.compact(knnlm.Datastore(store), console.RichProgress())
    if as_json:
        console.print_json(
            {
                "documents": removed.documents,
                "entries": removed.rows,
                "size_bytes": removed.size_bytes,
            }
        )
    else:
        console.OUT.print(
            f"removed {removed.documents:,} documents with {removed.rows:,} entries, "
            f"{console.amount(removed.size_bytes, 'bytes')}B"
        )


def verify(store: Store, as_json: Json = False) -> None:
    """Reread every file of a datastore against its checksums; exit 1 if anything is wrong."""
    import knnlm

    found = knnlm.verify(knnlm.Datastore(store), console.RichProgress())
    if as_json:
        console.print_json(
            {"shards": found.shards, "entries": found.rows, "problems": list(found.problems)}
        )
    elif not found.problems:
        console.OUT.print(f"{found.shards:,} shards with {found.rows:,} entries are sound")
    if found.problems:
        for problem in [] if as_json else found.problems:
            console.ERR.print(f"error: {problem}", soft_wrap=True)
        raise typer.Exit(1)
