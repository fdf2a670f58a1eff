"""Searching inverted lists for one or a few queries, on the CPU: reading memory is what it costs.

Every code of the probed lists is read once; exact distances are computed only for the candidates
with the best scores. One thread answers a query, in a handful of calls: waking another takes longer
than the half of the work that it would do.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.unfit_keys import measurable
from knnlm.index.ivf.candidates import Candidates, IndexArrays, write_nearest
from knnlm.index.ivf.kernels import Nearest, Pairs
from knnlm.index.ivf.query_code import ONLY, UNBOUNDED, Floats, exact_distances
from knnlm.index.ivf.read_ahead import read_ahead
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_SPARE_CANDIDATES = 32


def search_few(
    queries: Float[Tensor, "query dim"],
    index: IndexArrays,
    nprobe: int,
    k: int,
    oversampling: float,
) -> Neighbors:
    """Return the k nearest in the `nprobe` nearest lists; oversampling: see `bound_ranks`."""
    shape = len(queries), k
    nearest = Nearest(np.empty(shape, np.float32), np.empty(shape, np.int64))
    vectors = queries.float().contiguous().numpy()
    usable = measurable(queries).tolist()

    def search(number: int) -> None:
        one = slice(number, number + 1)
        out = Nearest(nearest.distances[one], nearest.rows[one])
        if usable[number]:
            wanted = int(oversampling * k) + _SPARE_CANDIDATES
            candidates = _candidates(vectors[number], index, nprobe, wanted)
            write_nearest(candidates, len(candidates.positions), index.rows, out)
        else:
            out.distances[:], out.rows[:] = np.inf, -1

    if len(queries) == 1:
        search(0)
    else:
        workers().map(search, range(len(queries)))
    return Neighbors(torch.from_numpy(nearest.distances), torch.from_numpy(nearest.rows))


def _candidates(query: Floats, index: IndexArrays, nprobe: int, wanted: int) -> Candidates:
    """Return exact distances of the candidates with the best scores."""
    code = index.lists.encode(query)
    probes = index.lists.nearest_lists(query, code, nprobe)
    bound = UNBOUNDED
    pieces = []
    for part in index.parts:
        if part.short:
            part.ask_for_codes(probes)
        # where scores are all there is to choose by, more than wanted would be no use
        margin = 0.0 if part.keys is None else code.margin
        bound, positions, scores = code.candidates(wanted, bound, probes, part.coded_keys, margin)
        if part.keys is None:
            distances = np.maximum(2 * (scores + code.half_norm), 0)
        else:
            if part.short:
                read_ahead(part.keys, positions, gap_bytes=0)
            distances = exact_distances(query, part.keys, positions)
        positions += part.first
        pieces.append((distances, positions))
    if len(pieces) == 1:
        distances, positions = pieces[0]
    else:
        distances = np.concatenate([distances for distances, _ in pieces])
        positions = np.concatenate([positions for _, positions in pieces])
    if index.stored is not None:
        queries = np.zeros(len(positions), np.int32)
        pairs = Pairs(query[None], queries, index.rows[positions])
        index.stored.measure(pairs, distances, parallel=False)
    return Candidates(distances, positions, ONLY[None], np.array([[len(positions)]]))
