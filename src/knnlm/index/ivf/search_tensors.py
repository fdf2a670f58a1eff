"""Searching inverted lists in tensor operations alone: for a GPU.

The same steps as in `search_batch`, and the same neighbors.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf.codes import SAMPLE_SHARE, bound_ranks, unpacked
from knnlm.index.ivf.lists import ProbingQueries
from knnlm.index.ivf.parts import Part
from knnlm.index.protocol import Neighbors

_ELEMENTS_AT_ONCE = 1 << 24
_BLOCK_ROWS = 1 << 18


def search_tensors(
    queries: ProbingQueries,
    parts: list[Part],
    rows: Int[Tensor, " n"],
    k: int,
    oversampling: float,
) -> Neighbors:
    """Return the k nearest in the probed lists; see `search_batch`."""
    search = _Search(queries, parts)
    bounds = search.bounds(k, oversampling)
    nearest, counts = search.nearest(bounds, rows, k)
    short = ((counts < search.available.clamp_max(k)) & bounds.isfinite()).nonzero()[:, 0]
    if len(short):
        again = _Search(queries.take(short), parts)
        unbounded = torch.full_like(bounds[short], torch.inf)
        better, _ = again.nearest(unbounded, rows, k)
        nearest.squared_distances[short] = better.squared_distances
        nearest.rows[short] = better.rows
    return nearest


class _Search:
    """Queries grouped by the lists that they probe."""

    def __init__(self, queries: ProbingQueries, parts: list[Part]) -> None:
        self.queries, _, probes, self.codes = queries
        self.parts = parts
        self.nprobe = probes.shape[1]
        lists, pairs = probes.reshape(-1).sort(stable=True)
        self.pairs = pairs
        numbers, counts = torch.unique(lists, return_counts=True)
        stops = counts.cumsum(0).tolist()
        self.groups = list(zip(numbers.tolist(), [0, *stops[:-1]], stops, strict=True))
        self.starts = [part.starts.tolist() for part in parts]
        lengths = torch.stack([part.starts.diff() for part in parts])
        self.lengths = lengths
        self.available = lengths.sum(dim=0)[probes].sum(dim=1)
        self.probes = probes

    def _scores(
        self, part: Part, queries: Int[Tensor, " m"], keys: slice
    ) -> Float[Tensor, "m key"]:
        codes = unpacked(part.codes[keys]).float()
        products = self.codes.codes[queries].float() @ codes.T
        return part.half_norms[keys] - self.codes.steps[queries, None] * part.steps[keys] * products

    def bounds(self, k: int, oversampling: float) -> Float[Tensor, " query"]:
        """Return scores that at least k of each query's candidates are almost surely within."""
        heads = (self.lengths * SAMPLE_SHARE).ceil().long()  # (part, list)
        width = int(heads.max())
        shape = len(self.queries) * self.nprobe, len(self.parts), width
        scores = torch.full(shape, torch.inf, device=self.queries.device)
        lengths = heads.tolist()
        for number, first, stop in self.groups:
            pairs = self.pairs[first:stop]
            for which, part in enumerate(self.parts):
                start, length = self.starts[which][number], lengths[which][number]
                keys = slice(start, start + length)
                scores[pairs, which, :length] = self._scores(part, pairs // self.nprobe, keys)
        sizes = heads.sum(dim=0)[self.probes].sum(dim=1)
        ranks = bound_ranks(sizes, self.available, k, oversampling)
        ascending = scores.view(len(self.queries), -1).sort(dim=1).values
        if ascending.shape[1] == 0:
            return torch.full_like(self.codes.steps, torch.inf)
        at_rank = ascending.gather(1, ranks.clamp_min(0)[:, None])[:, 0]
        return (at_rank + self.codes.margins()).masked_fill(ranks < 0, torch.inf)

    def nearest(
        self, bounds: Float[Tensor, " query"], rows: Int[Tensor, " n"], k: int
    ) -> tuple[Neighbors, Int[Tensor, " query"]]:
        """Return each query's nearest, and how many candidates were within its bound."""
        queries, distances, positions = [], [], []
        for number, first, stop in self.groups:
            members = self.pairs[first:stop] // self.nprobe
            offset = 0
            for which, part in enumerate(self.parts):
                start, end = self.starts[which][number], self.starts[which][number + 1]
                if end > start:
                    scores = self._scores(part, members, slice(start, end))
                    near = (scores <= bounds[members, None]) & scores.isfinite()
                    chosen, columns = near.nonzero(as_tuple=True)
                    queries.append(members[chosen])
                    positions.append(columns + start + offset)
                    if part.keys is None:
                        estimates = scores[near] + self.codes.half_norms[queries[-1]]
                        distances.append((2 * estimates).clamp_min(0.0))
                    else:
                        distances.append(
                            exact_distances(self.queries, queries[-1], part.keys, columns + start)
                        )
                offset += len(part.rows)
        empty = self.pairs.new_empty(0)
        query = torch.cat([empty, *queries])
        distance = torch.cat([self.codes.steps.new_empty(0), *distances])
        position = torch.cat([empty, *positions])
        ascending = distance.argsort(stable=True)
        order = ascending[query[ascending].argsort(stable=True)]
        query, distance, position = query[order], distance[order], position[order]
        counts = torch.bincount(query, minlength=len(self.queries))
        rank = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        kept = rank < k
        shape = len(self.queries), k
        nearest = Neighbors(
            torch.full(shape, torch.inf, device=query.device),
            torch.full(shape, -1, device=query.device),
        )
        nearest.squared_distances[query[kept], rank[kept]] = distance[kept]
        nearest.rows[query[kept], rank[kept]] = rows[position[kept]].long()
        return nearest, counts


def exact_distances(
    queries: Float[Tensor, "query dim"],
    chosen: Int[Tensor, " n"],
    keys: Float[Tensor, "key dim"],
    positions: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Return the squared distances of pairs of queries and keys."""
    size = max(1, _ELEMENTS_AT_ONCE // keys.shape[1])
    parts = [queries.new_empty(0)]
    for query, position in zip(
        torch.split(chosen, size), torch.split(positions, size), strict=True
    ):
        parts.append((queries[query] - keys[position].float()).square().sum(dim=1))
    return torch.cat(parts)


def rescore(
    store: Datastore, queries: Float[Tensor, "query dim"], candidates: Neighbors, k: int
) -> Neighbors:
    """Return the k nearest of candidates, by the exact distances of the datastore's own keys.

    Reads the datastore block by block, in its order.
    """
    pairs = candidates.present.nonzero()
    rows, order = candidates.rows[pairs[:, 0], pairs[:, 1]].sort()
    pairs = pairs[order]
    distances = torch.full_like(candidates.squared_distances, torch.inf)
    on_disk = rows.cpu()
    for start, keys in store.key_blocks(_BLOCK_ROWS):
        low, high = torch.searchsorted(on_disk, torch.tensor([start, start + len(keys)])).tolist()
        if high > low:
            unique, places = torch.unique(on_disk[low:high], return_inverse=True)
            needed = keys[unique - start].to(rows.device)
            chosen = pairs[low:high]
            distances[chosen[:, 0], chosen[:, 1]] = exact_distances(
                queries, chosen[:, 0], needed, places.to(rows.device)
            )
    nearest, columns = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
    return Neighbors(nearest, candidates.rows.gather(1, columns))
