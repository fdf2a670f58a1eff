"""Correcting what codes blur: distances estimated from codes, fitted to those of the keys.

The nearest by estimate are those whose estimate happens to be small, so that estimates are spread
more widely than distances: used as they are, they act like another temperature. A line through
pairs of both, for sampled queries, undoes that. Its slope is of differences within a query, because
nothing else matters to the weights of neighbors; its offset makes their mean right.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import IndexOptions
from knnlm.index.measure import with_exact_distances
from knnlm.index.protocol import Index, Neighbors

_QUERIES = 256
_FARTHEST_SLOPE = 4.0


class Calibration(NamedTuple):
    """squared distance ≈ offset + slope · estimate."""

    slope: float = 1.0
    offset: float = 0.0

    def of(self, estimates: Neighbors) -> Neighbors:
        """Return neighbors with corrected distances; their order is the same."""
        distances = (estimates.squared_distances * self.slope + self.offset).clamp_min_(0.0)
        return Neighbors(distances, estimates.rows)


def calibrated(index: Index, store: Datastore, options: IndexOptions) -> Calibration:
    """Fit the correction to an index that returns plain estimates.

    The queries are those of the options, or else stored keys, which are no neighbors of themselves.
    """
    k = min(options.k, len(store) - 1)
    if k < 2:
        return Calibration()
    generator = torch.Generator().manual_seed(options.seed)
    if options.queries is None:
        live = store.alive.nonzero()[:, 0]
        own_rows = live[torch.randperm(len(live), generator=generator)[:_QUERIES]]
        queries = store.keys_at(own_rows).float()
    else:
        chosen = torch.randperm(len(options.queries), generator=generator)[:_QUERIES]
        queries, own_rows = options.queries[chosen].float().cpu(), torch.full_like(chosen, -1)
    found = index.search(queries, k + 1)
    others = found.present & (found.rows != own_rows[:, None])
    exact = with_exact_distances(store, queries, found).squared_distances
    pairs = zip(found.squared_distances.double(), exact.double(), others, strict=True)
    return _line([(near[other], distance[other]) for near, distance, other in pairs])


def _line(pairs: list[tuple[Float[Tensor, " _"], Float[Tensor, " _"]]]) -> Calibration:
    """Return the line through estimates and distances, given for each query."""
    product = square = 0.0
    for estimates, distances in pairs:
        centered = estimates - estimates.mean() if len(estimates) else estimates
        product += float(centered @ distances)
        square += float(centered @ centered)
    slope = product / square if square > 0 else 1.0
    slope = min(max(slope, 1 / _FARTHEST_SLOPE), _FARTHEST_SLOPE)  # the order has to stay
    offsets = torch.cat([distances - slope * estimates for estimates, distances in pairs])
    return Calibration(slope, float(offsets.mean()) if len(offsets) else 0.0)
