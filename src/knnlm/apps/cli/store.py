"""The commands that look after a datastore: index, info, forget, compact, verify."""

from typing import Annotated

import typer

from knnlm.apps.cli import console
from knnlm.apps.cli.options import (
    Device,
    Dtype,
    IndexOption,
    Json,
    Model,
    Store,
    TextColumn,
)
from knnlm.apps.cli.text_commands import load_model
from knnlm.choices import IndexKind, ModelDtype


def index(
    store: Store,
    kind: IndexOption = IndexKind.auto,
    factory: Annotated[
        str | None,
        typer.Option(help="FAISS's, with --kind faiss: IVF1024,Flat …", show_default=False),
    ] = None,
    recall: Annotated[
        float, typer.Option(help="Of the k true nearest, the part to be found.")
    ] = 0.95,
    nprobe: Annotated[
        int | None,
        typer.Option(
            help="Lists a query looks into; by default the fewest that reach --recall.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Neighbors that recall is measured with.")] = 1024,
    queries: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out text, of which 8,192 tokens are read to measure recall; can be given "
            "several times. By default recall is that of stored keys.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    text_column: TextColumn = "text",
    dtype: Dtype = ModelDtype.auto,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Build the index that a datastore is searched with, and measure it against exact search.

    auto: exact up to 50,000 entries; above, ivf, which keeps a copy of the keys list by list;
    compressed, which keeps 8-bit codes only and reads the keys of candidates from the datastore,
    where that copy would fill half of the retriever. `knnlm build` does this by itself.

        knnlm index docs.store --kind ivf --recall 0.98 --queries held-out/tune
    """
    from knnlm.datastore.datastore import Datastore
    from knnlm.index.policy import build_index, describe_index
    from knnlm.index.queries import held_out_queries
    from knnlm.text.corpus import read_documents

    opened = Datastore(store)
    asked = None
    if queries:
        documents = read_documents(*queries, text_column=text_column)
        lm = load_model(opened, model, dtype, device)
        asked = held_out_queries(lm, opened, documents, progress=console.RichProgress())
    build_index(
        opened,
        kind.value,
        factory=factory,
        nprobe=nprobe,
        recall=recall,
        k=k,
        queries=asked,
        device=device,
        progress=console.RichProgress(),
    )
    if as_json:
        console.print_json(describe_index(opened))
    else:
        console.print_store(opened)


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
    """Remove the bytes of forgotten documents from the disk, and renew the index."""
    import knnlm
    from knnlm.index.policy import keep_index

    opened = knnlm.Datastore(store)
    removed = knnlm.compact(opened, console.RichProgress())
    keep_index(opened, progress=console.RichProgress())
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
            console.print_error(problem)
        raise typer.Exit(1)
