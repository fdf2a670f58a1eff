"""The loops of building an inverted file, compiled by numba for the CPU: which list is nearest.

Knows arrays, not indexes. Every kernel releases the GIL and runs on one thread.
"""

import numpy as np

from knnlm.index.ivf.kernels import Array, compiled


@compiled
def choose_groups(scores: Array, chosen: Array) -> None:
    """Write the groups with the least scores [key, group] of each key: chosen [key, probe]."""
    count = chosen.shape[1]
    least = np.empty(count, np.float32)
    for key in range(len(scores)):
        least[:] = np.inf
        for group in range(scores.shape[1]):
            score = scores[key, group]
            if score < least[count - 1]:
                place = count - 1
                while place > 0 and least[place - 1] > score:
                    least[place] = least[place - 1]
                    chosen[key, place] = chosen[key, place - 1]
                    place -= 1
                least[place] = score
                chosen[key, place] = group


@compiled
def keys_by_group(chosen: Array, ends: Array, keys: Array) -> None:
    """Sort pairs by group: those of group g are keys[ends[g − 1] : ends[g]].

    chosen [key, probe]: the groups of each key. ends: zeros at first.
    """
    for key in range(len(chosen)):
        for probe in range(chosen.shape[1]):
            ends[chosen[key, probe]] += 1
    total = 0
    for group in range(len(ends)):
        total += ends[group]
        ends[group] = total
    for key in range(len(chosen) - 1, -1, -1):
        for probe in range(chosen.shape[1]):
            ends[chosen[key, probe]] -= 1
            keys[ends[chosen[key, probe]]] = key
    for group in range(len(ends) - 1):
        ends[group] = ends[group + 1]
    ends[len(ends) - 1] = total


@compiled
def keep_nearest(scores: Array, keys: Array, first: int, least: Array, lists: Array) -> None:
    """Keep the least score of each key so far, and its list.

    scores [pair, list]: of `keys`, with the lists from `first` on. least, lists: by key.
    """
    for pair in range(len(keys)):
        best, place = scores[pair, 0], 0
        for column in range(1, scores.shape[1]):
            if scores[pair, column] < best:
                best, place = scores[pair, column], column
        if best < least[keys[pair]]:
            least[keys[pair]] = best
            lists[keys[pair]] = first + place


@compiled
def add_by_list(vectors: Array, lists: Array, sums: Array, counts: Array) -> None:
    """Add each vector to the sum of its list, and count it."""
    for number in range(len(vectors)):
        place = lists[number]
        counts[place] += 1
        for column in range(vectors.shape[1]):
            sums[place, column] += vectors[number, column]


@compiled
def sort_keys(lists: Array, rows: Array, seed: int, keys: Array) -> None:
    """Write a 64-bit key for each entry; sorted by it, entries lie list by list, at random within.

    The upper 24 bits are the list; the lower 40 a permutation of the numbers below 2⁴⁰, applied to
    the row: so no two are alike, and the order does not depend on how many are sorted at once.
    """
    mask = np.uint64((1 << 40) - 1)
    factor, other = np.uint64(0x9E3779B97F), np.uint64(0xBF58476D1D)
    for number in range(len(rows)):
        mixed = (np.uint64(rows[number]) ^ np.uint64(seed)) & mask
        for _ in range(3):
            mixed ^= mixed >> np.uint64(21)
            mixed = (mixed * factor) & mask
            mixed ^= mixed >> np.uint64(17)
            mixed = (mixed * other) & mask
        mixed ^= mixed >> np.uint64(20)
        keys[number] = (np.uint64(lists[number]) << np.uint64(40)) | mixed
