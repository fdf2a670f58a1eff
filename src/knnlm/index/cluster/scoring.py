"""A few queries in a share of an inverted file, answered so that a client can choose as one index.

An index measures only the entries with the best scores of all that it looks at. A share does not
know the scores of the others: chosen by its own, entries would be measured that one index leaves
out, and some of them are nearer than those it finds. So a share measures what may be a candidate,
and its answer has the scores too; `merging` then chooses.
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.unfit_keys import measurable
from knnlm.index.cluster.messages import Nearest, Scored
from knnlm.index.exact import ExactIndex
from knnlm.index.ivf.index import _FEW_QUERIES, _OVERSAMPLING, IVFIndex
from knnlm.index.protocol import check_search


def search_share(
    index: IVFIndex | ExactIndex, queries: Float[Tensor, "query dim"], k: int
) -> Nearest | Scored:
    """Return what a share has found. Raises what the search of an index does."""
    if (
        isinstance(index, IVFIndex)
        and index._behind is None
        and index.exact_distances
        and 0 < len(queries) <= _FEW_QUERIES
        and len(index.store) > 0
    ):
        return _scored(index, queries, k)
    found = index.search(queries, k)
    return Nearest(found.rows.numpy(), found.squared_distances.numpy())


def _scored(index: IVFIndex, queries: Float[Tensor, "query dim"], k: int) -> Scored:
    """Do what `search_few` does, up to the choice by distance."""
    from knnlm.index.ivf.kernels import Pairs
    from knnlm.index.ivf.query_code import UNBOUNDED, exact_distances
    from knnlm.index.ivf.read_ahead import read_ahead
    from knnlm.index.ivf.search_few import _SPARE_CANDIDATES
    from knnlm.threads import workers

    check_search(queries, k, index.store.settings.dimension)
    arrays, vectors = index._arrays, queries.numpy()
    wanted = int(_OVERSAMPLING[index.kind] * k) + _SPARE_CANDIDATES
    nprobe = max(index.nprobe, index.least_nprobe(k))
    shape = len(queries), len(arrays.parts)
    counts, margins = np.zeros(shape, np.int64), np.zeros(shape)
    usable = measurable(queries).tolist()

    def search(number: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        if not usable[number]:
            return []
        query = vectors[number]
        code = arrays.lists.encode(query)
        probes = arrays.lists.nearest_lists(query, code, nprobe)
        bound, pieces = UNBOUNDED, []
        for place, part in enumerate(arrays.parts):
            if part.short:
                part.ask_for_codes(probes)
            margin = 0.0 if part.keys is None else code.margin
            bound, positions, scores = code.candidates(
                wanted, bound, probes, part.coded_keys, margin
            )
            counts[number, place], margins[number, place] = len(positions), margin
            rows = arrays.rows[positions + part.first].astype(np.int64)
            if part.keys is None:
                distances = np.empty(len(positions), np.float32)
            else:
                if part.short:
                    read_ahead(part.keys, positions, gap_bytes=0)
                distances = exact_distances(query, part.keys, positions)
            if arrays.stored is not None:
                pairs = Pairs(query[None], np.zeros(len(rows), np.int32), rows)
                arrays.stored.measure(pairs, distances, parallel=False)
            pieces.append((rows, distances, scores))
        return pieces

    if len(queries) == 1:
        found = search(0)
    else:
        searched = workers().map(search, range(len(queries)))
        found = [piece for pieces in searched for piece in pieces]
    empty = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32)
    rows, distances, scores = (np.concatenate(column) for column in zip(empty, *found, strict=True))
    return Scored(rows, counts, np.array([wanted]), margins, distances, scores)
