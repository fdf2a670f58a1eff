"""The command `export`: a datastore as the arrays of another tool."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from knnlm.apps.cli import options
from knnlm.apps.cli.console import OUT, one_line, print_json
from knnlm.choices import ArrayFormat

_Folder = Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")]
_To = Annotated[
    ArrayFormat,
    typer.Option("--to", help="The tool that reads the files; see docs/importing.md."),
]
_ModelType = Annotated[
    str | None,
    typer.Option(
        help="With knn-transformers and arrow: the model_type in the model's config.json, such as "
        "gpt2, by which they find their files."
    ),
]


def export(
    store: options.Store,
    folder: _Folder,
    *,
    target: _To = ArrayFormat.npy,
    model_type: _ModelType = None,
    as_json: options.Json = False,
) -> None:
    """Write the keys and values of a datastore as arrays that other tools read.

    Entries are in the order in which they are stored, those of forgotten documents left out.
    Beside the arrays, knnlm.json has their shapes and dtypes and says where they come from, and
    documents.jsonl lists the documents; knnlm import reads both again.

        knnlm export docs.store arrays/ --to npy
    """
    import knnlm
    from knnlm.apps.cli.progress_bar import RichProgress

    exported = knnlm.export_datastore(
        store, folder, target=target, model_type=model_type, progress=RichProgress()
    )
    if as_json:
        print_json(asdict(exported) | {"folder": str(folder)})
        return
    OUT.print(
        f"{one_line(str(folder))}: {exported.entries:,} entries of {exported.documents:,} "
        f"documents, in the order stored, as {exported.format}: keys {exported.key_dtype} of "
        f"dimension {exported.dimension}, values {exported.value_dtype}",
        soft_wrap=True,
    )
