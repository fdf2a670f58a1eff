"""The command `import`: a datastore of another tool, proved by reading a sample of it again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import print_json
from knnlm.apps.cli.opening import ModelOptions, load_model
from knnlm.apps.cli.reports import print_store
from knnlm.choices import ArrayFormat, Boundary, Key, KeyDtype, ModelDtype
from knnlm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from knnlm.model.language_model import LanguageModel

_Store = Annotated[Path, typer.Argument(help="The new datastore's folder.")]
_Files = Annotated[
    list[str] | None,
    typer.Argument(
        help="The file of keys and the file of values, Arrow files in order, or the folder that "
        "holds them. None: prove a datastore that was imported unverified."
    ),
]
_From = Annotated[
    ArrayFormat | None,
    typer.Option("--from", help="The tool whose files they are; see docs/importing.md."),
]
_Model = Annotated[
    str | None,
    typer.Option(
        help="The model that computed the keys: a Hugging Face name, a folder or a .gguf file; by "
        "default the one that an export of knnlm names."
    ),
]
_Key = Annotated[
    Key | None,
    typer.Option(help="The hidden state that serves as key; by default ffn_input."),
]
_Dimension = Annotated[
    int | None,
    typer.Option(help="Of a key; for raw files that neither their name nor the model tells it of."),
]
_CutAfter = Annotated[
    int | None,
    typer.Option(
        help="The token id that ends a document, such as 50256; by default all is one document."
    ),
]
_Name = Annotated[
    str | None,
    typer.Option(help="Of the document, or of documents with their number; by default the file's."),
]
_MaxEntries = Annotated[
    int | None, typer.Option(help="Take only so many entries from the beginning.")
]
_Window = Annotated[
    int | None,
    typer.Option(
        help="Positions that the model read at once; by default as the tool does, see "
        "docs/importing.md."
    ),
]
_Context = Annotated[
    int | None,
    typer.Option(
        help="Positions of each window that repeat the previous one; by default likewise."
    ),
]
_Boundary = Annotated[
    Boundary | None,
    typer.Option(help="document or stream: how the tool read; by default as one stream."),
]
_KeyDtype = Annotated[
    KeyDtype | None, typer.Option(help="Precision of the keys on disk; by default the files'.")
]
_Unverified = Annotated[
    bool,
    typer.Option(
        "--unverified",
        help="Do not load the model and prove nothing; every report says so until it is proved.",
    ),
]
_Dtype = Annotated[
    ModelDtype,
    typer.Option(help="Precision of the model; auto: float32 on a CPU, else the checkpoint's."),
]


def import_store(
    store: _Store,
    files: _Files = None,
    *,
    source: _From = None,
    model: _Model = None,
    key: _Key = None,
    dimension: _Dimension = None,
    cut_after: _CutAfter = None,
    name: _Name = None,
    max_entries: _MaxEntries = None,
    window: _Window = None,
    context: _Context = None,
    boundary: _Boundary = None,
    key_dtype: _KeyDtype = None,
    unverified: _Unverified = False,
    dtype: _Dtype = ModelDtype.auto,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Make a datastore of the keys and values that another tool computed, and build its index.

    The values are the text, so that the import proves itself: a sample of the text is read again
    with the model, and the keys have to agree before anything is copied. An import may be
    interrupted at any time; rerun the same command to resume. Until it is whole, the datastore is
    not there. Without FILES, a datastore that was imported unverified is proved.

        knnlm import wiki.store checkpoints/ --from knn-transformers --model gpt2
    """
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress
    from knnlm.index.report import describe_datastore

    given = ModelOptions(model, dtype, device)
    if not files:
        _prove(store, given)
    else:
        knnlm.import_datastore(
            store,
            files,
            model if unverified else _load(store, files, source, key, given),
            source=source or "",
            key=key,
            dimension=dimension,
            max_entries=max_entries,
            cut_after=cut_after,
            name=name,
            window=window,
            context=context,
            boundary=boundary,
            key_dtype=key_dtype,
            unverified=unverified,
            progress=RichProgress(),
        )
    facts = describe_datastore(store)
    if as_json:
        print_json(facts)
    else:
        print_store(facts)


def _prove(store: Path, given: ModelOptions) -> None:
    """Prove a datastore that was imported unverified."""
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    if given.name is None:
        raise InvalidArgumentError(
            "files must name what to import; to prove a datastore that was imported already, give "
            "--model"
        )
    opened = knnlm.Datastore(store)
    knnlm.prove_import(opened, load_model(opened, given), RichProgress())


def _load(
    store: Path,
    files: list[str],
    source: ArrayFormat | None,
    key: Key | None,
    given: ModelOptions,
) -> "LanguageModel | None":
    """Load the model to prove an import with, if one was named; first refuse what needs none."""
    import knnlm
    from knnlm.exchange.checking import check_new_folder
    from knnlm.exchange.files import find_files

    if source is None or given.name is None:
        return None
    check_new_folder(store)
    find_files(files, source)
    return knnlm.LanguageModel.load(
        given.name, key=key or Key.ffn_input, dtype=given.dtype, device=given.device
    )
