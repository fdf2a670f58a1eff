"""What is refused before an import copies anything: an existing folder, and ids that are no tokens.

Knows entries and folders; no models.
"""

from dataclasses import dataclass
from pathlib import Path

from knnlm.datastore.catalog import catalog_exists
from knnlm.errors import DatastoreCorruptError, InvalidArgumentError
from knnlm.exchange.entries import Entries, ranges
from knnlm.progress import Progress
from knnlm.rules import MOST

_VALUES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class CheckedValues:
    """What was found in the values: the largest id, and the rows after those of a given token."""

    largest: int
    ends: list[int]


def check_new_folder(path: Path) -> None:
    """Refuse a path that holds anything. Raises InvalidArgumentError."""
    if catalog_exists(path):
        raise InvalidArgumentError(f"{path} is a datastore already; import into a new folder")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidArgumentError(f"{path} exists already; name a new folder")


def check_values(
    entries: Entries,
    rows: int,
    vocab_size: int | None,
    cut_after: int | None,
    *,
    path: Path,
    progress: Progress,
) -> CheckedValues:
    """Read all values once. Raises DatastoreCorruptError for what is no token of the model.

    vocab_size: None where it is not known. path: of the values, for the message.
    """
    largest, ends = 0, []
    with progress.task("check", rows, "entries") as advance:
        for start, stop in ranges(0, rows, _VALUES_AT_ONCE):
            values = entries.values(start, stop)
            limit = MOST if vocab_size is None else vocab_size
            if bool((wrong := (values < 0) | (values >= limit)).any()):
                row = int(wrong.int().argmax())
                raise _no_token(path, start + row, int(values[row]), vocab_size)
            largest = max(largest, int(values.max()))
            if cut_after is not None:
                ends += (start + 1 + (values == cut_after).nonzero()[:, 0]).tolist()
            advance(stop - start)
    if cut_after is not None and not ends:
        raise InvalidArgumentError(
            f"cut_after must be a token that {path} holds, but {cut_after} is not in it"
        )
    return CheckedValues(largest, ends)


def _no_token(path: Path, row: int, value: int, vocab_size: int | None) -> DatastoreCorruptError:
    if value < 0:
        rule = "an id below 0: values saved as int16 lose ids above 32,767, which cannot be undone"
    elif vocab_size is None:
        rule = "no id that any vocabulary has: the values may be of another format"
    else:
        rule = f"outside the model's vocabulary of {vocab_size} tokens: it is of another model"
    return DatastoreCorruptError(f"{path}: the value of row {row} is {value}, {rule}")
