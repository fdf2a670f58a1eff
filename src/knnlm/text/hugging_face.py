"""Datasets of the Hugging Face Hub, streamed: nothing of them is known before it arrives."""

from typing import Any

from knnlm.errors import TextNotFoundError, import_optional
from knnlm.text.rows import MISSING, Columns, NumberedRows, missing_column, value_of

SPLITS = frozenset({"train", "validation", "valid", "dev", "test"})


def load_dataset(source: str) -> Any:
    """Open the dataset of hf:NAME[:CONFIG][:SPLIT].

    Raises TextNotFoundError and MissingDependencyError.
    """
    datasets = import_optional("datasets", "reading hf: datasets", "data")
    parts = source.split(":")[1:]
    has_split = len(parts) == 3 or (len(parts) == 2 and parts[1] in SPLITS)
    split = parts.pop() if has_split else "train"
    try:
        if len(parts) > 2 or "" in (*parts, split):
            raise ValueError("the form is hf:NAME[:CONFIG][:SPLIT]")
        return datasets.load_dataset(*parts, split=split, streaming=True)
    except Exception as error:  # datasets has dozens, from HTTP errors to bad configurations
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise TextNotFoundError(
            f"text source {source!r} cannot be loaded as a Hugging Face dataset "
            f"({reason}): check its name, config and split, and the network"
        ) from error


def hf_rows(dataset: Any, columns: Columns, name: str) -> NumberedRows:
    """Yield the rows of a streamed dataset."""
    known = dataset.column_names
    if known is not None:
        wanted = [
            column if column in known else column.partition(".")[0] for column in columns.names
        ]
        for argument, column, top in zip(
            ("text_column", "id_column"), columns.names, wanted, strict=False
        ):
            if top not in known:
                raise missing_column(f"{name}:0", column, known, argument)
        dataset = dataset.select_columns(list(dict.fromkeys(wanted)))  # spares decoding images
    for number, row in enumerate(dataset):
        if number == 0 and value_of(row, columns.text) is MISSING:
            raise missing_column(f"{name}:0", columns.text, row)
        yield number, row
