"""Drafts: the next tokens as a datastore or the text itself has them, guessed before they are read.

The model reads a token and a draft after it in one pass, which takes little longer than the token
alone, and the mixture then chooses token by token, as it would without: a draft is used as far as
it says what was chosen (speculative decoding with retrieval, He et al. 2024, "REST"). So drafts
change how long generating takes, and no word.

Knows neighbors and tokens; knows no model. How long a draft pays: `draft_lengths`.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from knnlm.index.protocol import Neighbors
from knnlm.retrieval.retriever import Retriever

LONGEST_DRAFT = 12
_PLACES = 32  # whose continuations are compared, in each source
_LONGEST_MATCH = 12  # tokens before a place that are compared with the text
_GRAM = 2  # tokens that the text itself must repeat before it is continued likewise


class Draft(NamedTuple):
    """Tokens that may follow, and what is known of each of them when it is guessed.

    matches: how many tokens before it, the draft's included, agree where it was found; at most
    `LONGEST_MATCH` counts. shares: the part of the places' weight that says the same.
    """

    tokens: list[int]
    matches: list[int]
    shares: list[float]

    def first(self, count: int) -> "Draft":
        """Return the draft's beginning."""
        return Draft(self.tokens[:count], self.matches[:count], self.shares[:count])


NO_DRAFT = Draft([], [], [])


class _Continuations(NamedTuple):
    """What stands at some places, and how many tokens before agree with the text's last ones.

    tokens: −1 beyond a place's end.
    """

    tokens: Int[np.ndarray, "place ahead"]
    matches: Int[np.ndarray, " place"]


class Drafter:
    """Drafts for one text while it grows."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = np.empty(max(64, 2 * len(text)), np.int64)
        self._length = 0
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for token in text:
            self.push(token)

    def push(self, token: int) -> None:
        """Add a token to the text."""
        if self._length == len(self._text):
            self._text = np.concatenate([self._text, np.empty_like(self._text)])
        self._text[self._length] = token
        self._length += 1
        if self._length >= _GRAM:
            gram = tuple(self._text[self._length - _GRAM : self._length].tolist())
            self._places[gram].append(self._length)

    def draft(self, searched: Sequence[tuple[Retriever, Neighbors]], query: int) -> Draft:
        """Guess what follows the text.

        searched: the datastores, with the neighbors of several positions. query: which of them is
        the one before the text's last token.
        """
        recent = self._text[max(self._length - _LONGEST_MATCH, 0) : self._length][::-1]
        found = [self._continued_in_text(recent)]
        found += [
            _continued_in_store(retriever, neighbors, query, recent)
            for retriever, neighbors in searched
        ]
        return _follow(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def _continued_in_text(self, recent: Int[np.ndarray, " recent"]) -> _Continuations:
        gram = tuple(recent[:_GRAM][::-1].tolist())
        places = np.array(self._places.get(gram, ())[-1 - _PLACES : -1], np.int64)
        text = self._text[: self._length]
        stops = np.full(len(places), self._length)
        return _continued(text, places, stops, recent)


def _continued_in_store(
    retriever: Retriever, neighbors: Neighbors, query: int, recent: Int[np.ndarray, " recent"]
) -> _Continuations:
    """Continue the nearest neighbors that voted for the text's last token."""
    rows = neighbors.rows[query].cpu().numpy()
    values = retriever.store.values.numpy()
    rows = rows[(rows >= 0) & (values[rows] == recent[0])][:_PLACES]
    stops = np.array([retriever.store.document_at(int(row)).stop for row in rows], np.int64)
    return _continued(values, rows + 1, stops, recent)


def _continued(
    tokens: Int[np.ndarray, " token"],
    places: Int[np.ndarray, " place"],
    stops: Int[np.ndarray, " place"],
    recent: Int[np.ndarray, " recent"],
) -> _Continuations:
    """Continue places as far as their stops; recent: the text's last tokens, the last one first."""
    ahead = places[:, None] + np.arange(LONGEST_DRAFT)
    is_there = ahead < stops[:, None]
    continuations = np.where(is_there, tokens[np.where(is_there, ahead, 0)], -1)
    behind = places[:, None] - 1 - np.arange(len(recent))
    agrees = (behind >= 0) & (tokens[behind] == recent)
    return _Continuations(continuations, np.logical_and.accumulate(agrees, axis=1).sum(axis=1))


def _follow(
    continuations: Int[np.ndarray, "place ahead"], matches: Int[np.ndarray, " place"]
) -> Draft:
    """Follow, token by token, the places with the longest matches."""
    draft = Draft([], [], [])
    for depth in range(LONGEST_DRAFT):
        tokens = continuations[:, depth]
        if not len(tokens) or tokens.max() < 0:
            break
        weights = np.where(tokens >= 0, 2.0**matches, 0.0)
        candidates, groups = np.unique(tokens, return_inverse=True)
        sums = np.bincount(groups, weights)
        best = int(sums.argmax())
        agreeing = groups == best
        draft.tokens.append(int(candidates[best]))
        draft.matches.append(int(min(matches[agreeing].max() + depth, _LONGEST_MATCH)))
        draft.shares.append(float(sums[best] / sums.sum()))
        continuations, matches = continuations[agreeing], matches[agreeing]
    return draft
