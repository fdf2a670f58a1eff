"""The loops of a search for one query, compiled by numba: one thread reads all that a query needs.

Knows arrays, not indexes. What a *score* is: see `ivf_kernels`.
"""

import numpy as np

from knnlm.index.ivf.kernels import (
    CACHE_LINE,
    Array,
    add_product,
    compiled,
    prefetch,
    select,
)

_ROWS_AHEAD = 2
_CODES_AHEAD = 4


def _dot_rows(vector: Array, rows: Array, out: Array) -> None:
    """Compute the product of one vector with each row of a matrix, as fast as memory gives it."""
    address, row_bytes = rows.ctypes.data, rows.strides[0]
    for i in range(len(rows)):
        for line in range(0, row_bytes, CACHE_LINE):
            prefetch(address + (i + _ROWS_AHEAD) * row_bytes + line)
        row = rows[i]
        total = np.float32(0.0)
        for d in range(len(vector)):
            total += vector[d] * row[d]
        out[i] = total


dot_rows = compiled(_dot_rows)


def _encode(
    query: Array,
    center: Array,
    projection: Array,
    rest: Array,
    alikeness: float,
    largest_code: int,
    least_step: float,
    code: Array,
) -> tuple[np.float32, np.float32]:
    """Write the code of a query, as `Coder.encode` does; return its step and squared norm."""
    centered = query - center
    squared_norm = np.float32(0.0)
    for d in range(len(centered)):
        squared_norm += centered[d] * centered[d]
    turned = np.empty(len(projection), np.float32)
    dot_rows(centered, projection, turned)
    squared_rest = squared_norm
    for d in range(len(turned)):
        squared_rest -= turned[d] * turned[d]
    rest_length = np.float32(np.sqrt(alikeness * max(squared_rest, np.float32(0.0))))
    largest = np.float32(0.0)
    for d in range(len(turned)):
        turned[d] += rest_length * rest[d]
        largest = max(largest, abs(turned[d]))
    step = max(largest / np.float32(largest_code), np.float32(least_step))
    for d in range(len(turned)):
        code[d] = np.int8(np.rint(turned[d] / step))
    return step, squared_norm


encode = compiled(_encode)


def _candidates(
    query: Array,
    query_step: float,
    wanted: int,
    margin: float,
    bound: float,
    lists: Array,
    starts: Array,
    codes: Array,
    key_steps: Array,
    half_norms: Array,
) -> tuple[float, Array, Array]:
    """Score every key of some lists for one query, in their order, reading each code once.

    Returns the positions and scores of the `wanted` best keys, of those that may be as good (their
    scores are within the margin), and of none beyond the bound; and the smaller bound that follows.
    """
    total = 0
    for probe in range(len(lists)):
        total += starts[lists[probe] + 1] - starts[lists[probe]]
    scores = np.empty(total, np.float32)
    scored = 0
    address, code_bytes = codes.ctypes.data, codes.strides[0]
    for probe in range(len(lists)):
        for position in range(starts[lists[probe]], starts[lists[probe] + 1]):
            ahead = address + (position + _CODES_AHEAD) * code_bytes
            for line in range(0, code_bytes, CACHE_LINE):
                prefetch(ahead + line)
            code = codes[position]
            product = np.int32(0)
            for j in range(len(query)):
                product = add_product(product, query[j], code[j])
            step = query_step * key_steps[position]
            scores[scored] = half_norms[position] - step * np.float32(product)
            scored += 1
    if wanted < total:
        bound = min(bound, select(scores.copy(), wanted - 1) + margin)
    positions = np.empty(total, np.int64)
    near = np.empty(total, np.float32)
    found = scored = 0
    for probe in range(len(lists)):
        for position in range(starts[lists[probe]], starts[lists[probe] + 1]):
            score = scores[scored]
            positions[found] = position
            near[found] = score
            found += score <= bound
            scored += 1
    return bound, positions[:found], near[:found]


candidates = compiled(_candidates)
