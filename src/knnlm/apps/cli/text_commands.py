"""The commands that read text with a language model: build, tune, eval, generate."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.apps.cli import console
from knnlm.apps.cli.options import (
    DEFAULT_MODEL,
    Also,
    BoundaryOption,
    Cache,
    Context,
    Device,
    Dtype,
    Json,
    K,
    Lmbda,
    MaxTokens,
    Model,
    Store,
    Temperature,
    TextColumn,
    Texts,
    WeightsOption,
    Window,
)
from knnlm.choices import Boundary, IndexKind, Key, KeyDtype, ModelDtype, Weights
from knnlm.errors import DatastoreWriteError, InvalidArgumentError

if TYPE_CHECKING:
    from knnlm.datastore.datastore import Datastore
    from knnlm.knn_lm import KNNLM
    from knnlm.model.language_model import LanguageModel
    from knnlm.text.windows import Windowing


def load_model(
    store: "Datastore", model: str | None, dtype: ModelDtype, device: str
) -> "LanguageModel":
    """Load the language model that a datastore was built with, from there or another place."""
    asked = None if dtype is ModelDtype.auto else dtype.value
    return store.load_model(model, dtype=asked, device=device)


def open_model(
    path: Path,
    also: Sequence[Path] | None,
    model: str | None,
    dtype: ModelDtype,
    device: str,
    k: list[int] | None = None,
    lmbda: list[float] | None = None,
    temperature: list[float] | None = None,
    *,
    cache: bool = False,
    weights: Weights | None = None,
) -> "KNNLM":
    """Open datastores and model; parameters are refused before the model is loaded."""
    from knnlm.datastore.datastore import Datastore
    from knnlm.knn_lm import KNNLM
    from knnlm.retrieval.retriever import choose_parameters

    stores = [Datastore(one) for one in (path, *(also or ()))]
    given = {
        "k": _one_or_each(k), "lmbda": _one_or_each(lmbda), "temperature": _one_or_each(temperature)
    }  # fmt: skip
    choose_parameters(stores, **given)
    for store in stores:
        console.warn_of_poor_recall(store)
    lm = load_model(stores[0], model, dtype, device)
    return KNNLM(lm, stores, **given, cache=cache, weights=weights)


def _one_or_each(values: list[Any] | None) -> Any:
    """Return an option that was given once as the value for every datastore."""
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to, before the work; DatastoreWriteError."""
    if not folder.is_dir():
        raise DatastoreWriteError(f"cannot write to {folder}: no such folder; make it first")
    if not os.access(folder, os.W_OK):
        raise DatastoreWriteError(
            f"cannot write to {folder}: the folder is not writable; change its permissions or "
            "choose another"
        )


def _windowing(
    model: "KNNLM", window: int | None, context: int | None, boundary: Boundary | None
) -> "Windowing":
    from knnlm.text.windows import choose_windowing

    given = boundary.value if boundary else None
    return choose_windowing(
        model.lm.max_window,
        model.lm.name,
        window=window,
        context=context,
        boundary=given,
        default=model.windowing,
    )


def build(
    store: Store,
    text: Texts,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A hub name, a folder or a .gguf file; by default the datastore's own, for a new "
            f"one {DEFAULT_MODEL}.",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        Key | None,
        typer.Option(
            help="Hidden state of the last layer that is the key; by default ffn_input, the "
            "paper's.",
            show_default=False,
        ),
    ] = None,
    window: Window = None,
    context: Context = None,
    boundary: BoundaryOption = None,
    key_dtype: Annotated[
        KeyDtype | None,
        typer.Option(help="Precision of the keys on disk; default float16.", show_default=False),
    ] = None,
    max_entries: Annotated[
        int | None,
        typer.Option(help="Stop when the datastore has so many entries.", show_default=False),
    ] = None,
    index: Annotated[
        IndexKind | None,
        typer.Option(
            help="How it is searched; by default as before, for a new datastore auto.",
            show_default=False,
        ),
    ] = None,
    text_column: TextColumn = "text",
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a datastore from text, go on with an interrupted build, or add documents.

    Documents that are already stored with the same text are passed over; one whose text changed
    replaces its old version. Interrupt at any time: the same command goes on.

        knnlm build docs.store docs/ --model HuggingFaceTB/SmolLM2-135M
    """
    import knnlm
    from knnlm.datastore.catalog import FILE_NAME
    from knnlm.datastore.datastore import Datastore
    from knnlm.index.policy import build_index, keep_index

    documents = knnlm.read_documents(*text, text_column=text_column)
    rows = 0
    if (store / FILE_NAME).exists():
        existing = Datastore(store)
        rows = existing.rows
        if key is not None and key.value != existing.settings.key:
            raise InvalidArgumentError(
                f"{store} was built with key {existing.settings.key}, not {key.value}; leave "
                "--key out or build another datastore"
            )
        lm = load_model(existing, model, dtype, device)
    else:
        lm = knnlm.LanguageModel.load(
            model or DEFAULT_MODEL,
            key=(key or Key.ffn_input).value,
            dtype=dtype.value,
            device=device,
        )
    started = time.perf_counter()
    built = knnlm.build(
        store,
        lm,
        documents,
        window=window,
        context=context,
        boundary=boundary.value if boundary else None,
        key_dtype=key_dtype.value if key_dtype else None,
        max_entries=max_entries,
        progress=console.RichProgress(),
    )
    seconds = time.perf_counter() - started
    if index is None:
        keep_index(built, str(lm.device), console.RichProgress())
    else:
        build_index(built, index.value, device=str(lm.device), progress=console.RichProgress())
    added = built.rows - rows
    if as_json:
        console.print_json(console.describe(built) | {"added": added, "seconds": seconds})
        return
    console.print_store(built)
    console.OUT.print(f"added {added:,} entries in {seconds:.1f} s ({added / seconds:,.0f}/s)")


def tune(
    store: Store,
    text: Texts,
    also: Also = None,
    model: Model = None,
    max_k: Annotated[int, typer.Option(help="The largest k to try.")] = 1024,
    max_tokens: MaxTokens = None,
    window: Window = None,
    context: Context = None,
    boundary: BoundaryOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Where to draw the sweep; default STORE/tuning.png.", show_default=False),
    ] = None,
    text_column: TextColumn = "text",
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the best mixture on held-out text and store it as the default.

    Searches once, then tries k, λ and temperature on the neighbors found, fits a continuous cache
    (eval --cache uses it) and, on 2,048 tokens or more, learns to choose the weights of each token.
    Use text that is neither in the datastore nor in what you evaluate on.

        knnlm tune docs.store held-out/tune
    """
    import knnlm
    from knnlm.tuning.plot import plot_tuning

    documents = knnlm.read_documents(*text, text_column=text_column)
    if max_k < 1:
        raise InvalidArgumentError(f"max_k must be at least 1, got {max_k}: ask for a neighbor")
    opened = open_model(store, also, model, dtype, device)
    picture = plot or store / "tuning.png"
    for folder in (store, picture.parent):
        check_writable(folder)  # before the work
    tuning = knnlm.tune(
        opened,
        documents,
        max_k=max_k,
        windowing=_windowing(opened, window, context, boundary),
        max_tokens=max_tokens,
        progress=console.RichProgress(),
    )
    plot_tuning(tuning, picture)
    tuning.save([retriever.store for retriever in opened.retrievers], text)
    if as_json:
        console.print_json(tuning.to_dict() | {"plot": str(picture)})
        return
    console.print_tuning(tuning)
    console.OUT.print(f"picture: {picture}")


def evaluate(
    store: Store,
    text: Texts,
    also: Also = None,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    cache: Cache = False,
    weights: WeightsOption = None,
    max_tokens: MaxTokens = None,
    window: Window = None,
    context: Context = None,
    boundary: BoundaryOption = None,
    text_column: TextColumn = "text",
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of the language model and of the kNN-LM on held-out text.

    Every token is scored once, by both. Use text that is neither in the datastore nor was tuned on.

        knnlm eval docs.store held-out/test
    """
    import knnlm

    documents = knnlm.read_documents(*text, text_column=text_column)
    opened = open_model(
        store, also, model, dtype, device, k, lmbda, temperature, cache=cache, weights=weights
    )
    report = opened.perplexity(
        documents,
        windowing=_windowing(opened, window, context, boundary),
        max_tokens=max_tokens,
        progress=console.RichProgress(),
    )
    if as_json:
        console.print_json(report.to_dict())
    else:
        console.print_perplexity(report)


def generate(
    store: Store,
    prompt: Annotated[str, typer.Argument(help="The text to continue.", show_default=False)],
    also: Also = None,
    model: Model = None,
    k: K = None,
    lmbda: Lmbda = None,
    temperature: Temperature = None,
    cache: Cache = False,
    weights: WeightsOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")
    ] = False,
    sampling_temperature: Annotated[float, typer.Option(help="Of --sample.", min=0.01)] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of --sample.", min=0.01, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    dtype: Dtype = ModelDtype.auto,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt with the kNN-LM.

    Takes the likeliest token each time, unless --sample is given.

        knnlm generate docs.store "The nearest neighbors"
    """
    opened = open_model(
        store, also, model, dtype, device, k, lmbda, temperature, cache=cache, weights=weights
    )
    options: dict[str, Any] = (
        {"do_sample": True, "temperature": sampling_temperature, "top_p": top_p, "top_k": 0}
        if sample
        else {}
    )
    generation = opened.generate(prompt, max_new_tokens=max_new_tokens, seed=seed, **options)
    if as_json:
        console.print_json({"prompt": prompt, "text": generation.text, "tokens": generation.tokens})
    else:
        typer.secho(prompt, dim=True, nl=False)  # which wraps no line and expands no tab
        typer.echo(generation.text)
