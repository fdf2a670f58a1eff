"""Learning the lists of an inverted file, on a sample of the keys of all shards.

Reads the datastore in its order, a few keys here and a few there; writes nothing.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knnlm.datastore.datastore import Datastore
from knnlm.index.backend import check_keys
from knnlm.index.ivf.build import Learned, Work
from knnlm.index.ivf.codes import Coder, CodeShape
from knnlm.index.ivf.groups import Groups, kmeans
from knnlm.index.ivf.lists import Lists
from knnlm.threads import workers

KEYS_PER_LIST = 64
ROUNDS = 10
_LEAST_KEYS = 65_536
_LEAST_KEYS_PER_LIST = 8
_NUMBERS_AT_ONCE = 1 << 22
_CODER_KEYS = 65_536
_SIZED_BY = 16  # keys a list
_SIZED_AT_ONCE = 8192
_SCATTERED_BYTES = 2 << 30  # of keys; in more of them, neighbors are read together
_SCATTERED_ROWS = 1 << 24
_READ_BYTES = 16 << 10


def sample_size(rows: int, dim: int, nlist: int, memory: int) -> int:
    """Return how many keys the lists of a datastore are learned on; fewer where memory is short.

    memory: for the sample, in bytes. It may not suffice: at least 8 keys for each list are taken.
    """
    wanted = max(_LEAST_KEYS, KEYS_PER_LIST * nlist)
    least = max(min(_LEAST_KEYS, rows), _LEAST_KEYS_PER_LIST * nlist)
    return min(rows, max(least, min(wanted, memory // (4 * dim))))


def sample_keys(store: Datastore, count: int, seed: int) -> Float[Tensor, "n dim"]:
    """Return about `count` keys, float32, from all parts of a datastore, in its order.

    Raises DatastoreCorruptError for a key in it that is not `measurable`.
    """
    rows = _sample_rows(store, count, seed)
    dim = store.settings.dimension
    sample = torch.empty(len(rows), dim)
    size = max(1, _NUMBERS_AT_ONCE // dim)
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        keys = store.keys_at(some).float()
        check_keys(store, keys, some)
        sample[start : start + size] = keys
    return sample


def _sample_rows(store: Datastore, count: int, seed: int) -> Int[Tensor, " n"]:
    """Return ascending rows: one run of neighbors at random in each of many equal spans."""
    generator = torch.Generator().manual_seed(seed)
    row_bytes = store.key_dtype.itemsize * store.settings.dimension
    scattered = store.rows * row_bytes <= _SCATTERED_BYTES and store.rows <= _SCATTERED_ROWS
    if scattered or count >= store.rows:
        return torch.randperm(store.rows, generator=generator)[:count].sort().values
    length = max(1, _READ_BYTES // row_bytes)
    runs = max(1, count // length)
    span = store.rows // runs
    spare = max(1, span - length + 1)
    firsts = torch.arange(runs) * span + torch.randint(spare, (runs,), generator=generator)
    rows = firsts[:, None] + torch.arange(min(length, span))
    return rows.reshape(-1)


def fit_coder(sample: Float[Tensor, "n dim"], shape: CodeShape, seed: int) -> Coder:
    """Fit the coder to some keys of a sample, from all parts of it."""
    count = min(len(sample), _CODER_KEYS)
    chosen = torch.linspace(0, max(0, len(sample) - 1), count, dtype=torch.float64).long()
    return Coder.fit(sample[chosen], shape, seed)


def learn_lists(store: Datastore, nlist: int, shape: CodeShape, work: Work) -> Learned:
    """Place the centroids by k-means, and fit the coder.

    Raises DatastoreCorruptError for a key in the sample that is not `measurable`.
    """
    seed = work.seed
    with work.progress.task("train the index", ROUNDS, "rounds") as advance:
        count = sample_size(store.rows, store.settings.dimension, nlist, work.memory // 2)
        sample = sample_keys(store, count, seed)
        coder = fit_coder(sample, shape, seed)
        if nlist == 1:
            lists = Lists.around(coder.center[None].clone(), coder, work.key_dtype)
            return Learned(lists, np.ones(1, np.int64))
        centroids = kmeans(sample, nlist, seed, rounds=ROUNDS, advance=advance)
        some = sample[:: max(1, len(sample) // (_SIZED_BY * nlist))]
        groups = Groups(centroids, len(some), seed)
        chunks = workers().chunks(len(some), _SIZED_AT_ONCE)
        numbers = workers().map(lambda c: groups.nearest(some[c.start : c.stop]), chunks)
    sizes = torch.bincount(torch.cat(numbers), minlength=nlist).numpy()
    return Learned(Lists.around(centroids, coder, work.key_dtype), sizes)
