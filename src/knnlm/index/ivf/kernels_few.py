"""The loops of a search for one query, compiled by numba: one thread reads all that a query needs.

Knows arrays, not indexes. For scores, see `kernels`.
"""

from typing import NamedTuple

import numpy as np

from knnlm.index.ivf.codes import ALIKENESS_OF_RESTS, LARGEST_CODE, LEAST_STEP
from knnlm.index.ivf.kernels import CACHE_LINE, Array, add_product, compiled, prefetch

_ROWS_AHEAD = 2
_CODES_AHEAD = 4
_ALIKENESS = np.float32(ALIKENESS_OF_RESTS)
_LARGEST_CODE = np.float32(LARGEST_CODE)
_LEAST_STEP = np.float32(LEAST_STEP)


class CoderArrays(NamedTuple):
    """The arrays of a `Coder`."""

    center: Array
    projection: Array
    rest: Array


class CodedKeys(NamedTuple):
    """Keys list by list, starts[l] to starts[l + 1], with their codes; see `Codes`."""

    starts: Array
    codes: Array
    steps: Array
    half_norms: Array


@compiled
def dot_rows(vector: Array, rows: Array, out: Array) -> None:
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


@compiled
def encode(query: Array, coder: CoderArrays, code: Array) -> tuple[np.float32, np.float32]:
    """Write the code of a query, as `Coder.encode` does; return its step and squared norm."""
    centered = query - coder.center
    squared_norm = np.float32(0.0)
    for d in range(len(centered)):
        squared_norm += centered[d] * centered[d]
    turned = np.empty(len(coder.projection), np.float32)
    dot_rows(centered, coder.projection, turned)
    squared_rest = squared_norm
    for d in range(len(turned)):
        squared_rest -= turned[d] * turned[d]
    rest_length = np.float32(np.sqrt(_ALIKENESS * max(squared_rest, np.float32(0.0))))
    largest = np.float32(0.0)
    for d in range(len(turned)):
        turned[d] += rest_length * coder.rest[d]
        largest = max(largest, abs(turned[d]))
    step = max(largest / _LARGEST_CODE, _LEAST_STEP)
    for d in range(len(turned)):
        code[d] = np.int8(np.rint(turned[d] / step))
    return step, squared_norm


@compiled
def score(query: Array, step: float, lists: Array, keys: CodedKeys) -> Array:
    """Score every key of some lists for a query's code, in their order, reading each code once."""
    total = 0
    for probe in range(len(lists)):
        total += keys.starts[lists[probe] + 1] - keys.starts[lists[probe]]
    scores = np.empty(total, np.float32)
    scored = 0
    codes = keys.codes
    address, code_bytes = codes.ctypes.data, codes.strides[0]
    for probe in range(len(lists)):
        for position in range(keys.starts[lists[probe]], keys.starts[lists[probe] + 1]):
            ahead = address + (position + _CODES_AHEAD) * code_bytes
            for line in range(0, code_bytes, CACHE_LINE):
                prefetch(ahead + line)
            code = codes[position]
            product = np.int32(0)
            for j in range(len(query)):
                product = add_product(product, query[j], code[j])
            estimate = step * keys.steps[position] * np.float32(product)
            scores[scored] = keys.half_norms[position] - estimate
            scored += 1
    return scores


@compiled
def score_packed(query: Array, step: float, lists: Array, keys: CodedKeys) -> Array:
    """Score keys whose codes have 4 bits, as `score` does those of 8."""
    total = 0
    for probe in range(len(lists)):
        total += keys.starts[lists[probe] + 1] - keys.starts[lists[probe]]
    scores = np.empty(total, np.float32)
    scored = 0
    codes = keys.codes
    address, code_bytes = codes.ctypes.data, codes.strides[0]
    even, odd = query[::2].copy(), query[1::2].copy()
    offset = 15 * np.sum(query)  # a code is twice its 4 bits, less 15
    for probe in range(len(lists)):
        for position in range(keys.starts[lists[probe]], keys.starts[lists[probe] + 1]):
            ahead = address + (position + _CODES_AHEAD) * code_bytes
            for line in range(0, code_bytes, CACHE_LINE):
                prefetch(ahead + line)
            code = codes[position]
            product = np.int32(0)
            for j in range(len(code)):
                product = add_product(product, even[j], np.int8(code[j] & np.uint8(15)))
                product = add_product(product, odd[j], np.int8(code[j] >> np.uint8(4)))
            estimate = step * keys.steps[position] * np.float32(2 * product - offset)
            scores[scored] = keys.half_norms[position] - estimate
            scored += 1
    return scores


@compiled
def within(scores: Array, bound: float, lists: Array, starts: Array) -> tuple[Array, Array]:
    """Return the positions and scores of those keys of some lists that are within the bound."""
    positions = np.empty(len(scores), np.int64)
    near = np.empty(len(scores), np.float32)
    count = scored = 0
    for probe in range(len(lists)):
        for position in range(starts[lists[probe]], starts[lists[probe] + 1]):
            positions[count] = position
            near[count] = scores[scored]
            count += scores[scored] <= bound
            scored += 1
    return positions[:count], near[:count]
