"""The commands that look after a datastore: info, forget, compact, verify."""

from typing import Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT, amount, one_line, print_error, print_json
from knnlm.apps.cli.reports import print_store

_Documents = Annotated[
    bool,
    typer.Option(
        "--documents", help="List the documents: their entries, name and, if it differs, identity."
    ),
]
_Names = Annotated[
    list[str],
    typer.Argument(
        help="Names as `knnlm info --documents` lists them, paths of files or folders, for all "
        "documents in them, or patterns of names with \\* ? [ ]."
    ),
]


def info(
    store: options.Store, *, documents: _Documents = False, as_json: options.Json = False
) -> None:
    """Show what a datastore holds and how it was made."""
    from knnlm.index.report import describe_datastore

    facts = describe_datastore(store, list_documents=documents)
    if as_json:
        print_json(facts)
        return
    print_store(facts)
    for document in facts.get("document_list", []):
        entries = document["stop"] - document["start"]
        OUT.print(f"{entries:>10,}  {one_line(document['name'])}", soft_wrap=True)
        if "identity" in document:
            OUT.print(f"{'':>10}  = {one_line(document['identity'])}", soft_wrap=True)


def forget(store: options.Store, document: _Names, *, as_json: options.Json = False) -> None:
    """Forget documents: from now on, no search finds them.

    `knnlm compact` then removes them from the disk. Building again from a source that still
    contains a forgotten document stores it again.
    """
    from knnlm.datastore.datastore import Datastore

    forgotten = Datastore(store).forget(document)
    entries = sum(d.stop - d.start for d in forgotten)
    if as_json:
        print_json({"documents": [d.name for d in forgotten], "entries": entries})
    else:
        OUT.print(
            f"forgot {len(forgotten):,} documents with {entries:,} entries; knnlm compact {store} "
            "removes them from the disk",
            soft_wrap=True,
        )


def compact(store: options.Store, *, as_json: options.Json = False) -> None:
    """Remove forgotten documents from the disk and renew the index."""
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    removed = knnlm.compact(store, RichProgress())
    if as_json:
        print_json(
            {
                "documents": removed.documents,
                "entries": removed.rows,
                "size_bytes": removed.size_bytes,
            }
        )
    else:
        OUT.print(
            f"removed {removed.documents:,} documents with {removed.rows:,} entries, "
            f"{amount(removed.size_bytes, 'bytes')}B"
        )


def verify(store: options.Store, *, as_json: options.Json = False) -> None:
    """Check every file of a datastore against its checksum; exit with status 1 on any problem."""
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    verified = knnlm.verify(store, RichProgress())
    if as_json:
        print_json(
            {
                "shards": verified.shards,
                "entries": verified.rows,
                "problems": list(verified.problems),
            }
        )
    elif not verified.problems:
        OUT.print(f"{verified.shards:,} shards with {verified.rows:,} entries are sound")
    else:
        for problem in verified.problems:
            print_error(problem)
    if verified.problems:
        raise typer.Exit(1)
