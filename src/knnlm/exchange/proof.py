"""The proof of imported entries: values are the text, so that reading them gives the keys again.

Knows models, entries and windows; knows no files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Boundary
from knnlm.datastore.tables import StoredDocument
from knnlm.errors import DatastoreMismatchError, InvalidArgumentError
from knnlm.exchange.entries import Entries
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading import read_keys
from knnlm.progress import SILENT, Progress
from knnlm.text.windows import Span, Window, Windowing, document_windows

EXACT = 0.05
"""The distance of keys that agree, relative to their spread: rounding to bfloat16 gives less."""
ALIKE = 0.5
"""The distance of the same tokens' keys in windows that begin elsewhere."""
_LEADING, _SPREAD = 4, 12  # windows
_LEAST_ALIKE = 0.75
_LEAST_EXACT = 2


@dataclass(frozen=True, slots=True)
class Proof:
    """How well stored keys agree with those that a model gives the stored text.

    windows: that were read again. tokens: their keys that were compared. exact, alike: the windows
    whose keys agree, and those whose keys nearly do, as where the peer's windows began elsewhere.
    median_distance: of a stored key from the reread one, divided by the spread of the stored keys
    (their root mean square distance from their mean); of all compared tokens.
    """

    windows: int
    tokens: int
    exact: int
    alike: int
    median_distance: float


def prove(
    entries: Entries,
    lm: LanguageModel,
    windowing: Windowing,
    documents: Sequence[StoredDocument],
    *,
    rows: int,
    first_block: int = 0,
    progress: Progress = SILENT,
) -> Proof:
    """Read a sample of windows again, and demand that the keys agree.

    rows: how many entries count. windowing: how the peer read. documents: by row; they count where
    each is read on its own.
    first_block: in a stream, the first row at which a whole block of new positions begins.

    At least two windows have to agree within rounding, and three in four nearly: some peers start
    afresh at places that they do not record, so that later windows begin elsewhere. Raises
    DatastoreMismatchError if they do not, InvalidArgumentError for too few entries.
    """
    windowing.check_positions(lm.max_window, lm.name)
    if windowing.boundary == Boundary.document:
        sample = _of_documents(entries, documents, lm.start_token, windowing)
    else:
        sample = _of_stream(entries, rows, windowing, first_block)
    firsts, windows = [row for row, _ in sample], [window for _, window in sample]
    if not windows:
        least = first_block + 2 * windowing.window
        raise InvalidArgumentError(
            f"an import must hold at least one whole window with its context to be proved, about "
            f"{least} entries, got {rows}: give the sizes with which it was read as window "
            "and context, or import it unproved"
        )
    stored, found = [], []
    with progress.task("prove", sum(window.new for window in windows), "tokens") as advance:
        for number, keys in read_keys(lm, windows):
            row = firsts[number]
            stored.append(entries.keys(row, row + len(keys)).float())
            found.append(keys.float().cpu())
            advance(len(keys))
    return _judge(stored, found, lm)


def _judge(
    stored: list[Float[Tensor, "_ dim"]], found: list[Float[Tensor, "_ dim"]], lm: LanguageModel
) -> Proof:
    everything = torch.cat(stored)
    spread = (everything - everything.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    distances = [
        (one - other).norm(dim=1) / spread for one, other in zip(stored, found, strict=True)
    ]
    medians = torch.stack([one.median() for one in distances])
    proof = Proof(
        windows=len(stored),
        tokens=len(everything),
        exact=int((medians <= EXACT).sum()),
        alike=int((medians <= ALIKE).sum()),
        median_distance=float(torch.cat(distances).median()),
    )
    if proof.exact < min(_LEAST_EXACT, proof.windows) or proof.alike < _LEAST_ALIKE * proof.windows:
        raise DatastoreMismatchError(
            f"the keys must be those of {lm.name}, key {lm.key}, but {proof.windows} windows of "
            f"the text, read again, agree exactly in {proof.exact} and nearly in {proof.alike} "
            f"(median distance {proof.median_distance:.3f} of the spread of the keys): give the "
            "model, the key, and the window and context that it was read with"
        )
    return proof


def _of_stream(
    entries: Entries, rows: int, windowing: Windowing, first_block: int
) -> list[tuple[int, Window]]:
    """Return windows, each with the row of its first new position, from blocks of a stream."""
    context, new = windowing.context, windowing.window - windowing.context
    # the first token that a window reads precedes its first position's value
    skipped = max(0, -(-(context + 1 - first_block) // new))
    starts = range(first_block + skipped * new, rows - new + 1, new)
    windows = []
    for number in _spread(len(starts)):
        row = starts[number]
        tokens = entries.values(row - 1 - context, row + new).numpy().astype(np.int32)
        windows.append((row, Window(tokens, context, (Span(0, new),))))
    return windows


def _of_documents(
    entries: Entries, documents: Sequence[StoredDocument], start_token: int, windowing: Windowing
) -> list[tuple[int, Window]]:
    """Return windows, each with the row of its first new position, two of each document."""
    windows = []
    whole = [document for document in documents if document.stop > document.start]
    for number in _spread(len(whole)):
        row, stop = whole[number].start, whole[number].stop
        tokens = entries.values(row, min(stop, row + 2 * windowing.window)).numpy()
        pieces = [tokens.astype(np.int32)]
        read: Iterator[Window] = document_windows(number, pieces, start_token, windowing)
        for window, _ in zip(read, range(2), strict=False):
            windows.append((row, window))
            row += window.new
    return windows


def _spread(count: int) -> list[int]:
    """Return which of some windows to read: the first, and others all over."""
    spread = torch.linspace(0, count - 1, min(_SPREAD, count)).long().tolist() if count else []
    return sorted({*range(min(_LEADING, count)), *spread})
