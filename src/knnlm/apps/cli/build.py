"""The command `build`: store a text in a datastore."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT, one_line, print_error, print_json
from knnlm.apps.cli.opening import ModelOptions, load_model
from knnlm.apps.cli.reports import print_changes, print_store
from knnlm.apps.cli.texts import TextOptions, checked_texts
from knnlm.choices import IndexKind, Key, KeyDtype, ModelDtype, TextFormat
from knnlm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from knnlm.datastore.datastore import Datastore
    from knnlm.model.language_model import LanguageModel

_DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M"

_Model = Annotated[
    str | None,
    typer.Option(
        help="A Hugging Face name, a folder or a .gguf file; by default the model that the "
        f"datastore was built with, {_DEFAULT_MODEL} for a new one."
    ),
]
_Key = Annotated[
    Key | None,
    typer.Option(
        help="The hidden state of the last layer that serves as key; by default ffn_input, as in "
        "the paper."
    ),
]
_KeyDtype = Annotated[
    KeyDtype | None, typer.Option(help="Precision of the keys on disk; by default float16.")
]
_MaxEntries = Annotated[
    int | None, typer.Option(help="Stop when the datastore has this many entries.")
]
_Index = Annotated[
    IndexKind | None,
    typer.Option(
        help="How to search the datastore, see knnlm index; by default as before, auto for a new "
        "one."
    ),
]
_ControlTokens = Annotated[
    bool | None,
    typer.Option(
        "--control-tokens/--no-control-tokens",
        help="Whether </s> and the like in a text are the tokenizer's control tokens, here and in "
        "all text that is read with the datastore; by default as before, text in a new one.",
    ),
]
_Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Read rows as conversations, by default in the column messages, through the model's "
        "chat template, and store only what the assistant says.",
    ),
]
_Sync = Annotated[
    bool,
    typer.Option(
        "--sync",
        help="Forget the documents that are gone from the given folders and files, but from none "
        "in which something cannot be read.",
    ),
]
_Tune = Annotated[
    bool,
    typer.Option(
        "--tune/--no-tune",
        help="Whether to tune a new datastore on its own text, as knnlm tune does, and again when "
        "it has grown by a quarter since; what was tuned on other text stays.",
    ),
]
_Dtype = Annotated[
    ModelDtype,
    typer.Option(
        help="Precision of the model; auto: the one the datastore was built with, for a new one "
        "float32 on a CPU, otherwise the checkpoint's."
    ),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        help="Read the keys in this many processes, each on its GPU or its share of the cores; "
        "with --ray by default as many as the cluster has GPUs, or machines. See docs/scaling.md."
    ),
]
_Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Read the keys on the machines of a Ray cluster: HOST:PORT, or auto for the one that "
        "this machine belongs to. The datastore's folder must be shared by all of them.",
    ),
]
_Lease = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="How long a worker may say nothing while it loads the model or reads one batch, "
        "before another takes its place.",
    ),
]


def build(
    store: options.Store,
    text: options.Texts,
    *,
    model: _Model = None,
    key: _Key = None,
    window: options.Window = None,
    context: options.Context = None,
    boundary: options.Boundary = None,
    control_tokens: _ControlTokens = None,
    key_dtype: _KeyDtype = None,
    max_entries: _MaxEntries = None,
    index: _Index = None,
    sync: _Sync = False,
    tune: _Tune = True,
    chat: _Chat = False,
    text_column: options.TextColumn = "text",
    id_column: options.IdColumn = None,
    encoding: options.Encoding = "utf-8",
    text_format: options.Format = TextFormat.auto,
    skip_bad: options.SkipBad = False,
    gitignore: options.Gitignore = True,
    dtype: _Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    workers: _Workers = None,
    ray: _Ray = None,
    lease: _Lease = 600.0,
    as_json: options.Json = False,
) -> None:
    """Build a datastore from text, resume an interrupted build, or add documents.

    Documents already stored with the same text are skipped, however their path is spelled; a
    document whose text has changed replaces its old version. Rows that are gone from their file are
    forgotten, files that are gone from their folder with --sync. A new datastore reads 1,024
    positions at once, 256 of them context, and is tuned at the end. An interrupted build goes on
    when it is run again.

        knnlm build docs.store docs/ --model HuggingFaceTB/SmolLM2-135M
    """
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    if chat and text_column == "text":
        text_column = "messages"
    reading = TextOptions(text_column, id_column, encoding, text_format, skip_bad, chat, gitignore)
    with checked_texts(text, reading) as documents:
        lm, rows_before = _load_model(store, key, ModelOptions(model, dtype, device))
        started = time.perf_counter()
        built = knnlm.build(
            store,
            lm,
            documents,
            window=window,
            context=context,
            boundary=boundary,
            control_tokens=control_tokens,
            key_dtype=key_dtype,
            max_entries=max_entries,
            index=index,
            sync=sync,
            workers=workers,
            ray=ray,
            lease=lease,
            progress=RichProgress(),
        )
        seconds = time.perf_counter() - started
        if tune:
            knnlm.keep_tuned(built, lm, RichProgress())
        _print_built(built, rows_before, seconds, as_json)


def _print_built(built: "Datastore", rows_before: int, seconds: float, as_json: bool) -> None:
    """Print what a build made in so many seconds; exits with 1 if it set documents aside."""
    from knnlm.index.report import describe_datastore

    facts = describe_datastore(built.path)
    added = built.rows - rows_before
    assert built.changes is not None
    if as_json:
        changes = {"changes": asdict(built.changes)}
        print_json(facts | {"added": added, "seconds": seconds} | changes)
    else:
        print_store(facts)
        OUT.print(f"added {added:,} entries in {seconds:.1f} s ({added / seconds:,.0f}/s)")
        print_changes(built.path, built.changes)
    if aside := built.changes.set_aside:
        names = ", ".join(map(one_line, aside))
        print_error(f"reading {names} ended two workers, so that the build set it aside")
        raise typer.Exit(1)


def _load_model(path: Path, key: Key | None, model: ModelOptions) -> "tuple[LanguageModel, int]":
    """Load the model to build with; also return the rows that an existing datastore has."""
    import knnlm
    from knnlm.datastore.catalog import catalog_exists

    if not catalog_exists(path):
        lm = knnlm.LanguageModel.load(
            model.name or _DEFAULT_MODEL,
            key=(key or Key.ffn_input).value,
            dtype=model.dtype,
            device=model.device,
        )
        return lm, 0
    existing = knnlm.Datastore(path)
    if key is not None and key != existing.settings.key:
        raise InvalidArgumentError(
            f"{path} was built with key {existing.settings.key}, not {key}; leave --key out or "
            "build another datastore"
        )
    return load_model(existing, model), existing.rows
