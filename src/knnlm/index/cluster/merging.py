"""The k nearest of several shares' answers: by distance, and where that is equal by row.

Of scored candidates, equally far ones stay in the order that one index has them in. NumPy merges,
in the calling thread where there are few queries: on a busy machine, torch's threads would wait for
each other longer than all the rest takes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from knnlm.index.cluster.messages import Nearest, Scored
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_QUERIES_AT_ONCE = 64
_PLACE = 0xFFFFFFFF


def merge_shares(answers: Sequence[Nearest | Scored], k: int, coverage: float) -> Neighbors:
    """Return the k nearest in the answers of searches over different rows, in the shares' order."""
    scored = [answer for answer in answers if isinstance(answer, Scored)]
    if not scored:
        nearest = [answer for answer in answers if isinstance(answer, Nearest)]
        return _merge_nearest(nearest, k, coverage)
    queries = len(scored[0].counts)
    merged = Neighbors(torch.full((queries, k), torch.inf), torch.full((queries, k), -1), coverage)
    ends = [answer.counts.reshape(-1).cumsum().reshape(answer.counts.shape) for answer in scored]
    for query in range(queries):
        rows, distances = _chosen(scored, ends, query)
        order = _nearest_first(distances, k)
        merged.squared_distances[query, : len(order)] = torch.from_numpy(distances[order])
        merged.rows[query, : len(order)] = torch.from_numpy(rows[order])
    return merged


def _chosen(
    answers: Sequence[Scored], ends: Sequence[NDArray[np.int64]], query: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the candidates of a query that one index would choose, and in its order.

    It goes from part to part: of each it chooses the `wanted` best and those within a margin, and
    none worse than what another part had enough of. ends: of the runs of candidates, as counts.
    """
    bound, wanted, chosen = np.float32(np.inf), int(answers[0].wanted[0]), []
    for part in range(answers[0].counts.shape[1]):
        runs = [
            slice(end[query, part] - answer.counts[query, part], end[query, part])
            for answer, end in zip(answers, ends, strict=True)
        ]
        pairs = list(zip(answers, runs, strict=True))
        scores = np.concatenate([answer.scores[run] for answer, run in pairs])
        if wanted < len(scores):
            enough = np.partition(scores, wanted - 1)[wanted - 1]
            bound = min(bound, enough + answers[0].margins[query, part].item())
        near = scores <= bound
        rows = np.concatenate([answer.rows[run] for answer, run in pairs])
        distances = np.concatenate([answer.squared_distances[run] for answer, run in pairs])
        chosen.append((rows[near], distances[near]))
    rows, distances = (np.concatenate(column) for column in zip(*chosen, strict=True))
    return rows, distances


def _nearest_first(distances: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the places of the k smallest distances, equal ones in their order.

    Distances ≥ 0 sort like the integers with their bits; with the place in the low half, NumPy
    sorts both at once, faster than places by distances.
    """
    keys = distances.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(keys), dtype=np.uint64)
    if len(keys) > k:
        keys.partition(k - 1)
        keys = keys[:k]
    keys.sort()
    return (keys & np.uint64(_PLACE)).astype(np.int64)


def _merge_nearest(answers: Sequence[Nearest], k: int, coverage: float) -> Neighbors:
    distances = np.concatenate([answer.squared_distances for answer in answers], axis=1)
    rows = np.concatenate([answer.rows for answer in answers], axis=1)
    nearest = Neighbors(torch.empty(len(rows), k), torch.empty(len(rows), k).long(), coverage)
    out = nearest.squared_distances.numpy(), nearest.rows.numpy()

    def merge(chunk: range) -> None:
        some = slice(chunk.start, chunk.stop)
        order = distances[some].argsort(axis=1, kind="stable")  # merges what is ascending
        ascending = np.take_along_axis(distances[some], order, axis=1)
        ties = (ascending[:, 1:] == ascending[:, :-1])[:, :k] & (ascending[:, 1 : k + 1] < np.inf)
        for query in np.flatnonzero(ties.any(axis=1)):
            number = some.start + query
            order[query] = np.lexsort((rows[number], distances[number]))
        out[0][some] = ascending[:, :k]
        out[1][some] = np.take_along_axis(rows[some], order[:, :k], axis=1)

    if len(rows) <= _QUERIES_AT_ONCE:
        merge(range(len(rows)))
    else:
        workers().map(merge, workers().chunks(len(rows), _QUERIES_AT_ONCE))
    return nearest
