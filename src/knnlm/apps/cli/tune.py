"""The command `tune`: find the mixture that predicts a text best, the stored text or another."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from knnlm.apps.cli.texts import TextOptions, checked_texts
from knnlm.choices import Boundary, ModelDtype, TextFormat, Weights
from knnlm.errors import InvalidArgumentError
from knnlm.rules import check_k

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from knnlm.text.documents import Documents
    from knnlm.tuning.tune import Tuning

_Texts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT",
        help="Held-out text, given like the texts of knnlm build; by default the datastore's own.",
    ),
]
_Stored = Annotated[
    bool, typer.Option("--stored", help="Tune on the datastore's own text too, beside TEXT.")
]
_Seed = Annotated[int, typer.Option(help="Chooses the part of the stored text that is read.")]
_MaxTokens = Annotated[
    int | None,
    typer.Option(
        help="Stop after this many tokens of TEXT, and of the stored text; by default all of TEXT, "
        "65,536 of the stored text."
    ),
]
_MaxK = Annotated[int, typer.Option(help="The largest k to try.")]
_Plot = Annotated[
    Path | None,
    typer.Option(help="Where to save the plot of the sweep; by default STORE/tuning.png."),
]


def tune(
    store: options.Store,
    text: _Texts = None,
    *,
    stored: _Stored = False,
    seed: _Seed = 0,
    also: options.Also = None,
    model: options.Model = None,
    max_k: _MaxK = 1024,
    max_tokens: _MaxTokens = None,
    window: options.Window = None,
    context: options.Context = None,
    boundary: options.Boundary = None,
    plot: _Plot = None,
    text_column: options.TextColumn = "text",
    id_column: options.IdColumn = None,
    encoding: options.Encoding = "utf-8",
    text_format: options.Format = TextFormat.auto,
    skip_bad: options.SkipBad = False,
    gitignore: options.Gitignore = True,
    dtype: options.Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Find the best mixture for new text and store it as the default.

    Without TEXT, reads parts from all over the stored text; a document has no vote for its own
    tokens, nor have copies of it. knnlm build does that by itself. TEXT must be neither in the
    datastore nor in the text you evaluate on. Searches once, then tries k, λ and temperature on the
    neighbors found, fits a continuous cache (which --cache uses) and, given at least 2,048 tokens,
    trains a gate that chooses the weights for each token.

        knnlm tune docs.store

        knnlm tune docs.store held-out/tune
    """
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress
    from knnlm.tuning.plot import plot_tuning

    check_k(max_k, "max_k")
    windows = (window, context, boundary)
    reading = TextOptions(
        text_column, id_column, encoding, text_format, skip_bad, gitignore=gitignore
    )
    with _checked_if_given(text, reading, windows) as documents:
        unlearned = MixtureOptions(weights=Weights.fixed)  # a stored gate is replaced, not read
        opened = open_model(store, also, ModelOptions(model, dtype, device), unlearned)
        picture = plot or store / "tuning.png"
        check_writable(store)
        check_file_to_write("plot", picture)
        tuning = knnlm.tune(
            opened,
            documents,
            stored=stored or not text,
            max_k=max_k,
            windowing=choose_windowing(opened, *windows) if text else None,
            max_tokens=max_tokens,
            seed=seed,
            progress=RichProgress(),
        )
        plot_tuning(tuning, picture)
        tuning.save([retriever.store for retriever in opened.retrievers], text or [])
        _print(tuning, picture, as_json)


def _checked_if_given(
    text: list[str] | None,
    reading: TextOptions,
    windows: tuple[int | None, int | None, Boundary | None],
) -> "AbstractContextManager[Documents | None]":
    """Check the texts; without any, refuse what is only about them."""
    if text:
        return checked_texts(text, reading)
    if windows != (None, None, None):
        raise InvalidArgumentError(
            "window, context and boundary must go with a TEXT, got none: stored text is read as it "
            "was when the datastore was built"
        )
    return nullcontext()


def _print(tuning: "Tuning", picture: Path, as_json: bool) -> None:
    if as_json:
        print_json(tuning.to_dict() | {"plot": str(picture)})
        return
    print_tuning(tuning)
    OUT.print(f"plot: {picture}")
