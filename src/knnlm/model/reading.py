"""Documents → tokens → windows → keys and log-probabilities, in batches and in order.

The one place where text meets the language model; knows nothing of datastores or neighbors.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.choices import Boundary
from knnlm.errors import InvalidArgumentError, InvalidTextError
from knnlm.mixture.lm_summary import LMSummary, summarize_lm
from knnlm.mixture.rows import join
from knnlm.model.language_model import LanguageModel
from knnlm.model.reading_rules import BatchRules
from knnlm.rules import LARGEST, check_whole
from knnlm.text.conversations import text_to_conversation
from knnlm.text.documents import Document, Documents
from knnlm.text.windows import (
    Window,
    Windowing,
    document_windows,
    limit_windows,
    stream_windows,
    with_stored,
)

_ENCODE_CHARACTERS = 1 << 20  # of text handed to the tokenizer at once
_ENCODE_BLOCKS = 256
_LOGITS_BYTES = 1 << 29  # of float32 logits held at once
_SOFTMAX_ROWS = 256
_NO_HISTORY = np.empty(0, dtype=np.int32)


def total_bytes(documents: Iterable[Document]) -> int | None:
    """Return the size of a corpus if it is known without reading the text, for progress."""
    if isinstance(documents, Documents):
        return documents.total_bytes
    if isinstance(documents, Sequence):
        size_bytes: int = sum(document.size_bytes for document in documents)
        return size_bytes
    return None


class _EncodedBlock(NamedTuple):
    """first: the token before the others; stored: which of them become entries, None for all."""

    number: int
    name: str
    text: str
    tokens: np.ndarray
    first: int
    stored: np.ndarray | None


class EncodedDocument:
    """A document on its way into the model: its tokens, counted as they are taken.

    number: its place among the documents. skip: how many of its tokens were read in an earlier
    run; set before the first is taken.
    first_token: the context of the first one. stored: which of its tokens become entries; None for
    all.
    tokens, size_bytes, words: counts over the text taken so far; tokens include the start token
    if it is predicted too (in streams), words are separated by white space.
    exhausted: whether all tokens were taken.
    """

    def __init__(self, encoded: Iterator[_EncodedBlock], start: int | None) -> None:
        block = next(encoded)
        self.number = block.number
        self.name = block.name
        self.first_token = block.first
        self.stored = block.stored
        self.skip = self.tokens = self.size_bytes = self.words = 0
        self.exhausted = False
        self._encoded = chain([block], encoded)
        self._start = start
        self._digest = hashlib.sha256()

    def pieces(self, skip: int = 0) -> Iterator[np.ndarray]:
        """Yield the tokens after the first `skip`, int32; can be used once."""
        if self._start is not None:
            self.tokens = 1
            if skip == 0:
                yield np.array([self._start], dtype=np.int32)
        for block in self._encoded:
            seen, self.tokens = self.tokens, self.tokens + len(block.tokens)
            data = block.text.encode()
            self.size_bytes += len(data)
            self._digest.update(data)
            self.words += len(block.text.split())
            yield block.tokens[max(skip - seen, 0) :]
        self.exhausted = True
        self._encoded = chain()

    def fingerprint(self) -> str:
        """Return that of the text taken so far; once exhausted, the `Document`'s."""
        return self._digest.hexdigest()


def cut_documents(
    lm: LanguageModel,
    documents: Iterable[Document],
    windowing: Windowing,
    max_tokens: int | None = None,
    *,
    on_document: Callable[[EncodedDocument], None] | None = None,
    history: np.ndarray = _NO_HISTORY,
) -> Iterator[Window]:
    """Tokenize documents and cut them into windows; every token is new in exactly one of them.

    max_tokens: stop after this many new tokens. on_document: called with each document that has
    text, before its tokens are taken; may set its `skip`. history: the tokens that preceded the
    documents in a stream. Raises InvalidArgumentError for max_tokens below 1 and for windows longer
    than the model's positions.
    """
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens, most=LARGEST)
    windowing.check_positions(lm.max_window, lm.name)
    streaming = windowing.boundary == Boundary.stream
    start = lm.start_token if streaming else None
    encoded = _encode_documents(lm, documents, start, on_document, windowing.control_tokens)
    if streaming:
        pieces = ((document.number, document.pieces(document.skip)) for document in encoded)
        windows = stream_windows(pieces, windowing, history)
    else:
        windows = chain.from_iterable(_own_windows(document, windowing) for document in encoded)
    return limit_windows(windows, max_tokens)


def _own_windows(document: EncodedDocument, windowing: Windowing) -> Iterator[Window]:
    """Yield the windows of a document that starts afresh."""
    windows = document_windows(
        document.number, document.pieces(), document.first_token, windowing, skip=document.skip
    )
    if document.stored is None:
        return windows
    return with_stored(windows, document.stored, document.skip)


def _encode_documents(
    lm: LanguageModel,
    documents: Iterable[Document],
    start: int | None,
    on_document: Callable[[EncodedDocument], None] | None,
    control_tokens: bool,
) -> Iterator[EncodedDocument]:
    """Yield the documents that have text, in order; each must be used up before the next.

    Text is tokenized in batches across documents, and no more than a batch of it is held. start:
    a token to put before each document's own. control_tokens: see `Windowing`.
    """
    blocks = (
        _Block(number, document.name, text, document.chat)
        for number, document in enumerate(documents)
        for text in (["".join(document.blocks())] if document.chat else document.blocks())
    )
    encoded = chain.from_iterable(
        _encode_batch(lm, batch, start, control_tokens) for batch in _batched(blocks)
    )
    for _, group in groupby(encoded, key=attrgetter("number")):
        document = EncodedDocument(group, start)
        if on_document is not None:
            on_document(document)
        yield document


class _Block(NamedTuple):
    number: int
    name: str
    text: str
    chat: bool


def _encode_batch(
    lm: LanguageModel, blocks: Sequence[_Block], start: int | None, control_tokens: bool
) -> Iterator[_EncodedBlock]:
    """Yield the blocks with their tokens; start, control_tokens: see `_encode_documents`."""
    plain = [block.text for block in blocks if not block.chat]
    token_lists = iter(lm.encode(plain, control_tokens=control_tokens))
    for number, name, text, chat in blocks:
        if not chat:
            yield _EncodedBlock(number, name, text, next(token_lists), lm.start_token, None)
            continue
        if start is not None:
            raise InvalidArgumentError(
                f"conversations such as {name} need the boundary document, got stream: build "
                "another datastore for them"
            )
        try:
            tokens, said = lm.chat_template.encode_answers(text_to_conversation(text))
        except InvalidArgumentError as error:
            raise InvalidTextError(f"{name}: {error}") from error
        # the template's own first token stands where a document's start token does
        yield _EncodedBlock(number, name, text, tokens[1:], int(tokens[0]), said[1:])


def _batched(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    batch: list[_Block] = []
    characters = 0
    for block in blocks:
        batch.append(block)
        characters += len(block.text)
        if characters >= _ENCODE_CHARACTERS or len(batch) >= _ENCODE_BLOCKS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def default_batch_tokens(lm: LanguageModel) -> int:
    """Return how many positions the model reads in one batch."""
    return 2048 if lm.device.type == "cpu" else 16384


def key_batches(lm: LanguageModel, windows: Sequence[Window]) -> Iterator[list[int]]:
    """Yield the numbers of the windows that `read_batch` reads at once, until all are in one."""
    return _batches(lm.batch_rules, windows, default_batch_tokens(lm))


def read_batch(
    lm: LanguageModel, windows: Sequence[Window], numbers: Sequence[int]
) -> Iterator[tuple[int, Float[Tensor, "new dim"]]]:
    """Yield (window number, the keys of its new positions) of windows that are read in one pass.

    None of them is longer than the first.
    """
    keys = lm.keys(_padded(windows, numbers))
    for row, number in enumerate(numbers):
        window = windows[number]
        yield number, keys[row, window.context : window.positions]


def read_keys(
    lm: LanguageModel, windows: Sequence[Window]
) -> Iterator[tuple[int, Float[Tensor, "new dim"]]]:
    """Yield (window number, the keys of its new positions), in the order of the batches."""
    for numbers in key_batches(lm, windows):
        yield from read_batch(lm, windows, numbers)


class Likeliest(NamedTuple):
    """The model's likeliest tokens after some positions, the likeliest first."""

    tokens: Int[Tensor, "position top"]
    log_probs: Float[Tensor, "position top"]

    @classmethod
    def join(cls, parts: Sequence["Likeliest"]) -> "Likeliest":
        """Return those of consecutive positions."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


class WindowScores(NamedTuple):
    """The model's scores of one window's new positions, float32.

    number: of the window. log_probs: of the true tokens, in nats. summary, likeliest: of the whole
    distribution, if they were asked for.
    """

    number: int
    keys: Float[Tensor, "new dim"]
    log_probs: Float[Tensor, " new"]
    summary: LMSummary | None
    likeliest: Likeliest | None


def read_scores(
    lm: LanguageModel, windows: Sequence[Window], summarize: bool = False, likeliest: int = 0
) -> Iterator[WindowScores]:
    """Yield the keys and the model's own log-probabilities of each window's new tokens.

    likeliest: how many of the model's likeliest tokens to return in each place, on the CPU. Raises
    UnsupportedModelError for NaN.
    """
    affordable = _LOGITS_BYTES // (4 * lm.vocab_size)
    for numbers in _batches(lm.batch_rules, windows, min(default_batch_tokens(lm), affordable)):
        reading = lm.keys_and_logits(_padded(windows, numbers))
        for row, number in enumerate(numbers):
            window = windows[number]
            new = slice(window.context, window.positions)
            log_probs, summaries, tops = [], [], []
            for distribution, target_log_probs in _log_prob_slices(
                lm, reading.logits[row, new], torch.from_numpy(window.targets)
            ):
                log_probs.append(target_log_probs)
                if summarize:
                    summaries.append(summarize_lm(distribution))
                if likeliest:
                    top = distribution.topk(min(likeliest, lm.vocab_size), dim=1)
                    tops.append(Likeliest(top.indices.cpu(), top.values.cpu()))
            yield WindowScores(
                number,
                reading.keys[row, new].float(),
                torch.cat(log_probs),
                join(summaries) if summarize else None,
                Likeliest.join(tops) if likeliest else None,
            )


def _log_prob_slices(
    lm: LanguageModel, logits: Float[Tensor, "new vocab"], targets: Int[Tensor, " new"]
) -> Iterator[tuple[Float[Tensor, "slice vocab"], Float[Tensor, " slice"]]]:
    """Yield (log p of the vocabulary, log p of the targets) for a few positions at a time.

    In slices, because the softmax of many positions at once would double the memory of the logits.
    """
    for some_logits, some_targets in zip(
        torch.split(logits, _SOFTMAX_ROWS),
        torch.split(targets.to(logits.device, torch.int64), _SOFTMAX_ROWS),
        strict=True,
    ):
        log_probs = lm.log_probs(some_logits)
        yield log_probs, log_probs.gather(1, some_targets[:, None])[:, 0]


def _batches(
    rules: BatchRules, windows: Sequence[Window], batch_tokens: int
) -> Iterator[list[int]]:
    """Group windows of similar length, so that batches hold little padding."""
    order = sorted(range(len(windows)), key=lambda number: -windows[number].positions)
    for _, group in groupby(order, lambda number: rules.is_long(windows[number].positions)):
        left = list(group)
        while left:
            count = max(1, batch_tokens // windows[left[0]].positions) if rules.batches else 1
            yield left[:count]
            left = left[count:]


def _padded(windows: Sequence[Window], numbers: Sequence[int]) -> Int[Tensor, "batch time"]:
    # a causal model's real positions never attend to the padding on their right
    batch = np.zeros((len(numbers), windows[numbers[0]].positions), dtype=np.int64)
    for row, number in enumerate(numbers):
        batch[row, : windows[number].positions] = windows[number].inputs
    return torch.from_numpy(batch)
