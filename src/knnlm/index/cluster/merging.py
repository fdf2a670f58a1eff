"""The k nearest of several shares' answers: by distance, and where that is equal by row.

NumPy merges, in the calling thread where there are few queries: on a busy machine, torch's threads
would wait for each other longer than all the rest takes.
"""

from collections.abc import Sequence

import numpy as np
import torch

from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_QUERIES_AT_ONCE = 64


def merge_shares(answers: Sequence[Neighbors], k: int, coverage: float) -> Neighbors:
    """Return the k nearest in the answers of searches over different rows, each ascending."""
    distances = np.concatenate([answer.squared_distances.numpy() for answer in answers], axis=1)
    rows = np.concatenate([answer.rows.numpy() for answer in answers], axis=1)
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
