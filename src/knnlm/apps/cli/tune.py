"""The command `tune`: find the mixture that predicts a held-out text best."""

from pathlib import Path
from typing import Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT, print_json
from knnlm.apps.cli.opening import (
    MixtureOptions,
    ModelOptions,
    check_file_to_write,
    check_writable,
    choose_windowing,
    open_model,
)
from knnlm.apps.cli.reports import print_tuning
from knnlm.choices import ModelDtype
from knnlm.rules import check_k

_MaxK = Annotated[int, typer.Option(help="The largest k to try.")]
_Plot = Annotated[
    Path | None,
    typer.Option(help="Where to save the plot of the sweep; by default STORE/tuning.png."),
]


def tune(
    store: options.Store,
    text: options.Texts,
    *,
    also: options.Also = None,
    model: options.Model = None,
    max_k: _MaxK = 1024,
    max_tokens: options.MaxTokens = None,
    window: options.Window = None,
    context: options.Context = None,
    boundary: options.Boundary = None,
    plot: _Plot = None,
    text_column: options.TextColumn = "text",
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Find the best mixture on held-out text and store it as the default.

    Searches once, then tries k, λ and temperature on the neighbors found, fits a continuous cache
    (which --cache uses) and, given at least 2,048 tokens, trains a gate that chooses the weights
    for each token. Use text that is neither in the datastore nor in the text you evaluate on.

        knnlm tune docs.store held-out/tune
    """
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress
    from knnlm.tuning.plot import plot_tuning

    documents = knnlm.read_documents(*text, text_column=text_column)
    check_k(max_k, "max_k")
    opened = open_model(store, also, ModelOptions(model, dtype, device), MixtureOptions())
    picture = plot or store / "tuning.png"
    check_writable(store)
    check_file_to_write("plot", picture)
    tuning = knnlm.tune(
        opened,
        documents,
        max_k=max_k,
        windowing=choose_windowing(opened, window, context, boundary),
        max_tokens=max_tokens,
        progress=RichProgress(),
    )
    plot_tuning(tuning, picture)
    tuning.save([retriever.store for retriever in opened.retrievers], text)
    if as_json:
        print_json(tuning.to_dict() | {"plot": str(picture)})
        return
    print_tuning(tuning)
    OUT.print(f"plot: {picture}")
