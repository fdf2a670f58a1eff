"""The datastore's own text as text to tune on: read again, each document without its own votes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.choices import Boundary
from knnlm.datastore.datastore import Datastore
from knnlm.datastore.near_copies import places_of_rows
from knnlm.errors import DatastoreMismatchError, InvalidArgumentError
from knnlm.evaluation.scoring import ScoreRequest, score_windows
from knnlm.knn_lm import KNNLM
from knnlm.mixture.continuous_cache import (
    CacheNeighbors,
    ContinuousCache,
    join_cache_neighbors,
)
from knnlm.model.language_model import LanguageModel
from knnlm.progress import SILENT, Progress
from knnlm.tuning.held_out import CACHE_K, CACHE_SIZES, HeldOutText, at_most
from knnlm.tuning.left_out import LeftOut, Queries, large_documents, leave_out, search_others
from knnlm.tuning.stored_windows import StoredWindow, inputs_before, sample_windows

DEFAULT_TOKENS = 65_536
_MOST_DIFFERENCE = 0.05  # of keys that are computed again, in units of their variance,
_ROUNDING = 1e-3  # and of their squared length: what bfloat16 may lose

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredSample:
    """The part of a datastore's own text that was tuned on.

    tokens, documents: how many. copies: how many other documents had no vote, for some of them,
    because they are copies or near-copies. large: how many of the tokens are in documents that are
    more than a fifth of the datastore, of which only the neighborhood of each token had no vote.
    alone: how many tokens had no neighbor at all.
    """

    tokens: int
    documents: int
    copies: int
    large: int
    alone: int


class StoredText(NamedTuple):
    """Stored text as a fit needs it, and what it is."""

    text: HeldOutText
    sample: StoredSample


def read_stored(
    model: KNNLM,
    k: int,
    *,
    max_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    progress: Progress = SILENT,
) -> StoredText:
    """Read windows from all over the (first) datastore, and search each one for their neighbors.

    A token's own document has no vote for it, nor have copies of that: see `left_out`. Raises
    InvalidArgumentError where nothing can be read, and DatastoreMismatchError where the model does
    not compute the stored keys again.
    """
    retrievers = at_most(k, model.retrievers)
    store, lm = retrievers[0].store, model.lm
    windows = sample_windows(store, lm.start_token, max_tokens, seed)
    if not windows:
        raise InvalidArgumentError(
            f"{store.path} must have more stored text to be tuned on it: give held-out text"
        )
    queries = _queries(store, windows)
    chosen = np.unique(queries.places).tolist()
    left_out = leave_out(store, chosen, [retriever.store for retriever in retrievers])
    request = ScoreRequest((), summary=True)
    parts: list[HeldOutText] = []
    read_tokens, read_windows = 0, 0
    with progress.task("tune", len(queries.rows), "tokens") as advance:
        for scores in score_windows(lm, [one.window for one in windows], request):
            assert scores.lm is not None
            some = queries[read_tokens : read_tokens + len(scores.targets)]
            if not parts:
                _check_keys(store, some, scores.keys)
            voters = tuple(
                retriever.voters(search_others(retriever, some, scores.keys, own))
                for retriever, own in zip(retrievers, left_out, strict=True)
            )
            group = windows[read_windows : read_windows + len(scores.windows)]
            cached = _find_in_cache(store, lm, group, scores.keys)
            parts.append(
                HeldOutText(
                    scores.targets, scores.lm_log_probs, scores.lm, scores.keys, voters, cached
                )
            )
            read_tokens += len(scores.targets)
            read_windows += len(group)
            advance(len(scores.targets))
    text = HeldOutText.join(parts)
    return StoredText(text, _describe(store, text, queries, left_out))


def _queries(store: Datastore, windows: Sequence[StoredWindow]) -> Queries:
    rows = np.concatenate([np.arange(one.row, one.row + one.window.new) for one in windows])
    return Queries(rows, places_of_rows(store)[rows].astype(np.int64))


def _check_keys(store: Datastore, queries: Queries, keys: Float[Tensor, "query dim"]) -> None:
    """Refuse a model that computes other keys than those stored, although it has their weights.

    In a stream the text before a document may have been compacted away: then it is only a warning.
    """
    stored = store.keys_at(torch.from_numpy(queries.rows)).double()
    difference = float((keys.double() - stored).square().sum())
    variance = float((stored - stored.mean(dim=0)).square().sum())
    allowed = _MOST_DIFFERENCE * variance + _ROUNDING * float(stored.square().sum())
    if difference <= allowed:
        return
    what = (
        f"the keys of {store.path} must be those that {store.settings.model} computes again from "
        f"the stored text, but they differ by {difference / max(variance, 1e-300):.0%} of their "
        "variance"
    )
    if store.windowing.boundary != Boundary.stream:
        raise DatastoreMismatchError(f"{what}; load the model as it was, or give held-out text")
    _LOG.warning("%s; was the stream cut by forget and compact?", what)


def _find_in_cache(
    store: Datastore,
    lm: LanguageModel,
    windows: Sequence[StoredWindow],
    keys: Float[Tensor, "token dim"],
) -> tuple[CacheNeighbors, ...]:
    """Return what continuous caches of CACHE_SIZES find that have read all before each window."""
    by_size: list[list[CacheNeighbors]] = [[] for _ in CACHE_SIZES]
    most = max(CACHE_SIZES)
    parts = torch.split(keys, [one.window.new for one in windows])
    for one, window_keys in zip(windows, parts, strict=True):
        cache = ContinuousCache(most, lm.dimension)
        rows, before = inputs_before(store, lm.start_token, one, most)
        if len(rows):
            inputs = torch.from_numpy(before).long()
            cache.remember(inputs[None], store.keys_at(torch.from_numpy(rows)).float()[None])
        inputs = torch.from_numpy(one.window.inputs[one.window.context :]).long()
        view = cache.read(inputs[None], window_keys[None])
        for found, size in zip(by_size, CACHE_SIZES, strict=True):
            found.append(view.nearest(CACHE_K, size))
    return tuple(map(join_cache_neighbors, by_size))


def _describe(
    store: Datastore, text: HeldOutText, queries: Queries, left_out: Sequence[LeftOut]
) -> StoredSample:
    copies = sum(len(np.unique(np.concatenate(list(own.copies.values())))) for own in left_out)
    has_neighbor = torch.stack([voters.present for voters in text.voters]).any(dim=0)
    return StoredSample(
        tokens=len(text),
        documents=len(np.unique(queries.places)),
        copies=copies,
        large=int(np.isin(queries.places, list(large_documents(store))).sum()),
        alone=int((~has_neighbor).sum()),
    )
