"""Searching inverted lists for one or a few queries, on the CPU: reading memory is what it costs.

Every code of the probed lists is read once; exact distances are computed only for the candidates
with the best scores.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.index import ivf_kernels as kernels
from knnlm.index.ivf_batch import UNBOUNDED, Floats, Integers, PartArrays, Runs, nearest_of
from knnlm.index.ivf_codes import Codes, Effort
from knnlm.index.ivf_workers import workers
from knnlm.index.protocol import Neighbors

_SPARE_CANDIDATES = 32


def search_few(
    queries: Float[Tensor, "query dim"],
    codes: Codes,
    probes: Int[Tensor, "query probe"],
    parts: list[PartArrays],
    rows: Int[Tensor, " n"],
    k: int,
    effort: Effort,
) -> Neighbors:
    """Return the k nearest in the probed lists. rows: the datastore's, by position."""
    shares = max(1, workers().threads // len(queries))  # of one query's lists
    query_arrays, query_codes = queries.numpy(), codes.codes.float().numpy()
    steps, half_norms, lists = codes.steps.numpy(), codes.half_norms.numpy(), probes.numpy()
    pieces = [
        (query, part, lists[query, share::shares])
        for query in range(len(queries))
        for share in range(shares)
        for part in parts
    ]

    def score(piece: tuple[int, PartArrays, Integers]) -> tuple[Floats, Integers]:
        query, part, chosen = piece
        capacity = int((part.starts[chosen + 1] - part.starts[chosen]).sum())
        scores, positions = np.empty(capacity, np.float32), np.empty(capacity, np.int64)
        kernels.score_lists(
            query_codes[query], steps[query], chosen, part.starts, part.codes.numpy(), part.steps,
            part.half_norms, scores, positions,
        )  # fmt: skip
        return scores, positions

    scored = workers().map(score, pieces)
    per_query = len(pieces) // len(queries)
    wanted = int(effort.oversampling * k) + _SPARE_CANDIDATES
    bounds = []
    for query in range(len(queries)):
        runs = scored[query * per_query : (query + 1) * per_query]
        scores = np.concatenate([scores for scores, _ in runs])
        bound = kernels.select(scores, wanted - 1) if wanted < len(scores) else UNBOUNDED
        bounds.append(min(bound, UNBOUNDED))

    def measure(number: int) -> tuple[Floats, Integers]:
        query, part, _ = pieces[number]
        scores, positions = scored[number]
        near = scores <= bounds[query]
        distances, positions = scores[near], positions[near]
        if part.keys is None:
            distances = np.maximum(2 * (distances + half_norms[query]), 0)
        else:
            kernels.exact(
                query_arrays, np.array([query]), part.keys, positions, np.array([len(positions)]),
                distances,
            )  # fmt: skip
        return distances, positions + part.first

    measured = workers().map(measure, range(len(pieces)))
    counts = np.array([len(distances) for distances, _ in measured], np.int64)
    return nearest_of(
        Runs(
            np.concatenate([distances for distances, _ in measured]),
            np.concatenate([positions for _, positions in measured]),
            (np.cumsum(counts) - counts).reshape(len(queries), -1),
            counts.reshape(len(queries), -1),
        ),
        rows,
        k,
    )
