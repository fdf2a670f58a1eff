"""Documents → tokens → windows → keys and scores, in batches and in order.

The one place where text meets the language model; knows nothing of datastores or neighbors.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, repeat
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.choices import Boundary, parse_choice
from knnlm.errors import InvalidArgumentError
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.model.language_model import LanguageModel
from knnlm.text.corpus import Document, Documents
from knnlm.text.windows import Window, check_window, document_windows, stream_windows

DEFAULT_WINDOW = 1024
DEFAULT_CONTEXT = 256
_ENCODE_CHARACTERS = 1 << 20  # of text handed to the tokenizer at once
_ENCODE_BLOCKS = 256
_LOGITS_BYTES = 1 << 29  # of float32 logits held at once
_SOFTMAX_ROWS = 256
_NO_HISTORY = np.empty(0, dtype=np.int32)


def total_bytes(documents: Iterable[Document]) -> int | None:
    """Return the size of a corpus where it is known without reading it, for progress."""
    if isinstance(documents, Documents):
        return documents.total_bytes
    if isinstance(documents, Sequence):
        size_bytes: int = sum(document.size_bytes for document in documents)
        return size_bytes
    return None


@dataclass(frozen=True, slots=True)
class Windowing:
    """How text is cut into what the model reads at once.

    window: positions read at once. context: how many of them were already scored by the window
    before. boundary: "document" (each document starts afresh) or "stream" (all documents are one
    stream, as in Khandelwal et al. 2020).

    Raises InvalidArgumentError.
    """

    window: int = DEFAULT_WINDOW
    context: int = DEFAULT_CONTEXT
    boundary: str = Boundary.document

    def __post_init__(self) -> None:
        check_window(self.window, self.context)
        parse_choice(Boundary, "boundary", self.boundary)

    def check_model(self, lm: LanguageModel) -> None:
        """Refuse windows that the model cannot read at once; raises InvalidArgumentError."""
        if lm.max_window is not None and self.window > lm.max_window:
            raise InvalidArgumentError(
                f"window must be at most {lm.max_window} for {lm.name}, got {self.window}: "
                "the model has no more positions"
            )


def choose_windowing(
    lm: LanguageModel,
    window: int | None = None,
    context: int | None = None,
    boundary: str | None = None,
    default: Windowing | None = None,
) -> Windowing:
    """Fill in what was not asked for: `default`'s, else 1,024 positions of which 256 are context.

    Defaults shrink to what the model and a smaller window allow. Raises InvalidArgumentError.
    """
    if default is None:
        size = min(DEFAULT_WINDOW, lm.max_window or DEFAULT_WINDOW)
        default = Windowing(size, size // 4)
    if window is None:
        window = default.window
    if context is None:
        context = min(default.context, window // 4)
    chosen = Windowing(window, context, default.boundary if boundary is None else boundary)
    chosen.check_model(lm)
    return chosen


class _EncodedBlock(NamedTuple):
    number: int
    name: str
    text: str
    tokens: np.ndarray


class EncodedDocument:
    """A document on its way into the model: its tokens, and what was counted of it so far.

    tokens: pulled so far, the start token included where it is predicted too (streams).
    size_bytes, words: of the text pulled so far; words are separated by white space.
    exhausted: whether all of it was pulled.
    """

    def __init__(
        self, number: int, name: str, encoded: Iterator[_EncodedBlock], start: int | None
    ) -> None:
        self.number = number
        self.name = name
        self.tokens = self.size_bytes = self.words = 0
        self.exhausted = False
        self._encoded = encoded
        self._start = start

    def pieces(self, skip: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens after the first `skip`, int32; can be used once."""
        if self._start is not None:
            self.tokens = 1
            if skip == 0:
                yield np.array([self._start], dtype=np.int32)
        for block in self._encoded:
            seen, self.tokens = self.tokens, self.tokens + len(block.tokens)
            self.size_bytes += len(block.text.encode())
            self.words += len(block.text.split())
            yield block.tokens[max(skip - seen, 0) :]
        self.exhausted = True
        self._encoded = iter(())


def encode_documents(
    lm: LanguageModel, documents: Iterable[Document], boundary: str
) -> Iterator[EncodedDocument]:
    """Yield the documents that have text, in order; each must be used up before the next.

    Text is tokenized in batches across documents, and never more of it than a batch is held. In a
    stream the start token is put before each document's tokens.
    """
    start = lm.start_token if boundary == Boundary.stream else None
    blocks = (
        (number, document.name, text)
        for number, document in enumerate(documents)
        for text in document.blocks()
    )
    encoded = chain.from_iterable(_encode(lm, batch) for batch in _batched(blocks))
    for (number, name), group in groupby(encoded, key=attrgetter("number", "name")):
        yield EncodedDocument(number, name, group, start)


_Block = tuple[int, str, str]


def _batched(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    batch: list[_Block] = []
    characters = 0
    for block in blocks:
        batch.append(block)
        characters += len(block[2])
        if characters >= _ENCODE_CHARACTERS or len(batch) >= _ENCODE_BLOCKS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(lm: LanguageModel, batch: Sequence[_Block]) -> Iterator[_EncodedBlock]:
    tokens = lm.encode([text for _, _, text in batch])
    return (_EncodedBlock(*block, of_block) for block, of_block in zip(batch, tokens, strict=True))


def cut_windows(
    documents: Iterable[EncodedDocument],
    start_token: int,
    windowing: Windowing,
    skip: int = 0,
    history: np.ndarray = _NO_HISTORY,
) -> Iterator[Window]:
    """Cut encoded documents into windows; every token is new in exactly one of them.

    skip: how many tokens of the first document were already read. history: what preceded them in a
    stream.
    """
    size, context = windowing.window, windowing.context
    skips = chain([skip], repeat(0))
    if windowing.boundary == Boundary.stream:
        pieces = ((d.number, d.pieces(skip)) for d, skip in zip(documents, skips, strict=False))
        yield from stream_windows(pieces, size, context, history)
    else:
        for document, already in zip(documents, skips, strict=False):
            yield from document_windows(
                document.number, document.pieces(), start_token, size, context, already
            )


def default_batch_tokens(lm: LanguageModel) -> int:
    """Return how many positions are read at once where nobody asked for a number."""
    return 2048 if lm.device.type == "cpu" else 16384


def read_keys(
    lm: LanguageModel, windows: Sequence[Window], batch_tokens: int
) -> Iterator[tuple[int, Float[Tensor, "new dim"]]]:
    """Yield (window number, the keys of its new positions), in the order of the batches."""
    for numbers in _batches(windows, batch_tokens):
        keys = lm.keys(_padded(windows, numbers))
        for row, number in enumerate(numbers):
            window = windows[number]
            yield number, keys[row, window.context : window.positions]


class WindowScores(NamedTuple):
    """What the model says of a window's new positions; float32, log_probs of the true tokens.

    summary: of its whole distribution, where that was asked for.
    """

    number: int
    keys: Float[Tensor, "new dim"]
    log_probs: Float[Tensor, " new"]
    summary: LMSummary | None


def read_scores(
    lm: LanguageModel, windows: Sequence[Window], batch_tokens: int, summarize: bool = False
) -> Iterator[WindowScores]:
    """Yield the keys and the model's own log-probabilities of each window's new tokens."""
    affordable = _LOGITS_BYTES // (4 * lm.vocab_size)
    for numbers in _batches(windows, min(batch_tokens, affordable)):
        reading = lm.keys_and_logits(_padded(windows, numbers))
        for row, number in enumerate(numbers):
            window = windows[number]
            new = slice(window.context, window.positions)
            targets = torch.from_numpy(window.targets).to(lm.device, torch.int64)
            log_probs, summaries = [], []
            for logits, of_logits in zip(
                torch.split(reading.logits[row, new], _SOFTMAX_ROWS),
                torch.split(targets, _SOFTMAX_ROWS),
                strict=True,
            ):
                distribution = torch.log_softmax(logits, dim=-1)
                log_probs.append(distribution.gather(1, of_logits[:, None])[:, 0])
                if summarize:
                    summaries.append(summarize_lm(distribution))
            yield WindowScores(
                number,
                reading.keys[row, new].float(),
                torch.cat(log_probs),
                LMSummary.join(summaries) if summarize else None,
            )


def _batches(windows: Sequence[Window], batch_tokens: int) -> Iterator[list[int]]:
    """Group windows of similar length, so that little of a padded batch is padding."""
    order = sorted(range(len(windows)), key=lambda number: -windows[number].positions)
    while order:
        count = max(1, batch_tokens // windows[order[0]].positions)
        yield order[:count]
        order = order[count:]


def _padded(windows: Sequence[Window], numbers: Sequence[int]) -> Int[Tensor, "batch time"]:
    # a causal model's real positions never see the padding on their right
    batch = np.zeros((len(numbers), windows[numbers[0]].positions), dtype=np.int64)
    for row, number in enumerate(numbers):
        batch[row, : windows[number].positions] = windows[number].inputs
    return torch.from_numpy(batch)
