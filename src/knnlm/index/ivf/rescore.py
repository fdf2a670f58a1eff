"""Exact distances of a compressed index's candidates, from the datastore's own keys.

Reads the datastore block by block, in its order, so that the disk is read forwards.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.ivf.search_tensors import exact_distances
from knnlm.index.protocol import Neighbors
from knnlm.threads import workers

_BLOCK_ROWS = 1 << 18
_QUERIES_AT_ONCE = 64


def rescore(
    store: Datastore,
    queries: Float[Tensor, "query dim"],
    candidates: Neighbors,
    k: int,
    compiled: bool,
) -> Neighbors:
    """Return the k nearest of candidates, whose distances are estimates.

    compiled: with the kernels, on the CPU, instead of tensor operations.
    """
    measure = _distances if compiled else _distances_in_tensors
    distances = measure(store, queries, candidates)
    nearest, columns = distances.topk(min(k, distances.shape[1]), dim=1, largest=False)
    return Neighbors(nearest, candidates.rows.gather(1, columns))


def _distances(
    store: Datastore, queries: Float[Tensor, "query dim"], candidates: Neighbors
) -> Float[Tensor, "query candidate"]:
    from knnlm.index.ivf import kernels  # numba takes half a second to import

    distances = torch.full_like(candidates.squared_distances, torch.inf)
    out, rows = distances.numpy(), candidates.rows.numpy()
    vectors = queries.float().contiguous().numpy()
    for first_row, block in store.key_blocks(_BLOCK_ROWS):
        keys = block.float() if block.dtype == torch.bfloat16 else block
        bits = (keys.view(torch.uint16) if keys.dtype == torch.float16 else keys).numpy()

        def measure(chunk: range, first_row: int = first_row, keys: object = bits) -> None:
            part = slice(chunk.start, chunk.stop)
            kernels.exact_in_block(vectors[part], rows[part], keys, first_row, out[part])

        chunks = workers().chunks(len(queries), _QUERIES_AT_ONCE)
        if len(chunks) == 1:
            measure(chunks[0])
        else:
            workers().map(measure, chunks)
    return distances


def _distances_in_tensors(
    store: Datastore, queries: Float[Tensor, "query dim"], candidates: Neighbors
) -> Float[Tensor, "query candidate"]:
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
    return distances
