"""The command `index`: choose how a datastore is searched."""

from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import print_json
from knnlm.apps.cli.opening import ModelOptions, load_model
from knnlm.apps.cli.reports import print_store
from knnlm.apps.cli.texts import TextOptions, checked_texts
from knnlm.choices import IndexKind, ModelDtype, TextFormat

if TYPE_CHECKING:
    from torch import Tensor

    from knnlm.datastore.datastore import Datastore

_Kind = Annotated[IndexKind, typer.Option(help="How to search the datastore.")]
_Factory = Annotated[
    str | None,
    typer.Option(help="With --kind faiss: a FAISS factory string, such as IVF1024,Flat."),
]
_Recall = Annotated[
    float, typer.Option(help="The share of the true k nearest neighbors that must be found.")
]
_Nprobe = Annotated[
    int | None,
    typer.Option(help="Lists searched for each query; by default the fewest that reach --recall."),
]
_K = Annotated[int, typer.Option(help="The number of neighbors for which recall is measured.")]
_Memory = Annotated[
    str | None,
    typer.Option(
        help="How much memory building ivf or compressed may use, such as 8GiB, without the files "
        "that are read; by default half of the memory. auto minds it too."
    ),
]
_Queries = Annotated[
    list[str] | None,
    typer.Option(
        help="Held-out text to measure recall on (its first 8,192 tokens); may be repeated. By "
        "default recall is measured on stored keys."
    ),
]


def index(
    store: options.Store,
    *,
    kind: _Kind = IndexKind.auto,
    factory: _Factory = None,
    recall: _Recall = 0.95,
    nprobe: _Nprobe = None,
    k: _K = 1024,
    queries: _Queries = None,
    memory: _Memory = None,
    model: options.Model = None,
    text_column: options.TextColumn = "text",
    id_column: options.IdColumn = None,
    encoding: options.Encoding = "utf-8",
    text_format: options.Format = TextFormat.auto,
    skip_bad: options.SkipBad = False,
    gitignore: options.Gitignore = True,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Build the index that a datastore is searched with, and measure it against exact search.

    exact compares each query with every key. ivf groups the keys into lists and searches only the
    nearest ones, in its own copy of the keys; compressed keeps 4-bit codes instead of that copy
    and reads the keys of the candidates from the datastore; codes has longer ones and reads no
    keys: its distances are estimates. auto is exact up to 50,000 entries, above that ivf, or
    compressed if the copy would fill more than --memory, or half of the memory. knnlm build
    already builds the auto index; use this command to choose another.

    It says what it will take before it begins. A large index that was begun goes on when the same
    command is run again.

        knnlm index docs.store --kind ivf --recall 0.98 --queries held-out/tune
    """
    from knnlm.apps.cli.progress_bar import RichProgress
    from knnlm.datastore.datastore import Datastore
    from knnlm.index.policy import build_index
    from knnlm.index.report import describe_datastore

    opened = Datastore(store)
    keys = None
    if queries:
        reading = TextOptions(
            text_column, id_column, encoding, text_format, skip_bad, gitignore=gitignore
        )
        keys = _held_out_keys(opened, queries, reading, ModelOptions(model, dtype, device))
    build_index(
        opened,
        kind.value,
        factory=factory,
        nprobe=nprobe,
        recall=recall,
        k=k,
        queries=keys,
        device=device,
        progress=RichProgress(),
        memory=memory,
    )
    facts = describe_datastore(store)
    if as_json:
        print_json(facts["index"])
    else:
        print_store(facts)


def _held_out_keys(
    store: "Datastore", text: list[str], reading: TextOptions, model: ModelOptions
) -> "Tensor":
    """Return the keys [query, dimension] of the first tokens of a held-out text."""
    from knnlm.apps.cli.progress_bar import RichProgress
    from knnlm.index.queries import held_out_queries

    with checked_texts(text, reading) as documents:
        return held_out_queries(load_model(store, model), store, documents, progress=RichProgress())
