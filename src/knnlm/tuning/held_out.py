"""Held-out text, read and searched once: everything that a fit needs, without the model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knnlm.datastore.overlap import Overlap, find_overlap
from knnlm.evaluation.scoring import CacheRequest, ScoreRequest, score_documents
from knnlm.knn_lm import KNNLM
from knnlm.mixture.continuous_cache import CacheNeighbors, join_cache_neighbors
from knnlm.mixture.interpolation import Voters
from knnlm.mixture.lm_summary import LMSummary
from knnlm.mixture.rows import join
from knnlm.progress import SILENT, Progress
from knnlm.retrieval.retriever import Retriever
from knnlm.text.documents import Document
from knnlm.text.windows import Windowing

CACHE_SIZES = (64, 256, 1024, 4096)
"""The sizes of the continuous caches that a held-out text is read with."""
CACHE_K = 256
"""How many pairs of a continuous cache vote."""


class TargetNeighbors(NamedTuple):
    """The neighbors of each token of a held-out text, as a sweep over k, T and λ needs them.

    lm_log_probs: log p_LM of the true tokens, the targets. votes: which neighbors vote for them.
    """

    lm_log_probs: Float[Tensor, " token"]
    squared_distances: Float[Tensor, "token k"]
    votes: Bool[Tensor, "token k"]

    def nearest(self, k: int) -> "TargetNeighbors":
        """Return each token's k nearest neighbors."""
        return TargetNeighbors(self.lm_log_probs, self.squared_distances[:, :k], self.votes[:, :k])


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Everything that tuning needs to know about each token of a held-out text.

    lm_log_probs: log p_LM of the true tokens, the targets. keys: of the positions before them.
    voters: for each datastore. cache_neighbors: for a continuous cache of each of CACHE_SIZES.
    overlap: how much of the text is stored, known of the whole text.
    """

    targets: Int[Tensor, " token"]
    lm_log_probs: Float[Tensor, " token"]
    lm: LMSummary
    keys: Float[Tensor, "token dim"]
    voters: tuple[Voters, ...]
    cache_neighbors: tuple[CacheNeighbors, ...]
    overlap: Overlap | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def for_targets(self, voters: Voters) -> TargetNeighbors:
        """Return voters as a sweep needs them: only whether they vote for the true tokens."""
        votes = voters.tokens == self.targets[:, None]
        return TargetNeighbors(self.lm_log_probs, voters.squared_distances, votes)

    @classmethod
    def join(cls, parts: list["HeldOutText"]) -> "HeldOutText":
        """Join consecutive parts of a text."""
        return cls(
            torch.cat([part.targets for part in parts]),
            torch.cat([part.lm_log_probs for part in parts]),
            join([part.lm for part in parts]),
            torch.cat([part.keys for part in parts]),
            tuple(map(join, zip(*(p.voters for p in parts), strict=True))),
            tuple(map(join_cache_neighbors, zip(*(p.cache_neighbors for p in parts), strict=True))),
        )


def at_most(k: int, retrievers: Sequence[Retriever]) -> tuple[Retriever, ...]:
    """Return retrievers that search for k entries, or for all where a datastore has fewer."""
    return tuple(
        replace(r, parameters=replace(r.parameters, k=min(k, len(r.store)))) for r in retrievers
    )


def read_held_out(
    model: KNNLM,
    documents: Iterable[Document],
    k: int,
    windowing: Windowing,
    *,
    max_tokens: int | None = None,
    progress: Progress = SILENT,
) -> HeldOutText | None:
    """Read a held-out text and search each datastore once, for the k nearest of every token.

    A datastore with fewer than k entries gives all of them. Takes 8·k bytes for each token and
    datastore. Returns None for a text without tokens.
    """
    retrievers = at_most(k, model.retrievers)
    cache = CacheRequest(CACHE_SIZES, CACHE_K, boundary=windowing.boundary)
    text = score_documents(
        model.lm,
        documents,
        windowing,
        ScoreRequest(retrievers, cache, summary=True),
        max_tokens=max_tokens,
        progress=progress,
        description="tune",
    )
    parts = []
    for scores in text.scores:
        assert scores.lm is not None
        voters = tuple(
            retriever.voters(neighbors)
            for retriever, neighbors in zip(retrievers, scores.neighbors, strict=True)
        )
        parts.append(
            HeldOutText(
                scores.targets,
                scores.lm_log_probs,
                scores.lm,
                scores.keys,
                voters,
                scores.cache_neighbors,
            )
        )
    if not parts:
        return None
    overlap = find_overlap([r.store for r in retrievers], text.documents, text.targets)
    return replace(HeldOutText.join(parts), overlap=overlap)
