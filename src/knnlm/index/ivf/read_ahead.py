"""Asking for parts of mapped files before they are used, where memory cannot hold them all.

A page that is not in memory is read when it is touched, alone, while the thread waits: ten thousand
pages a second at most. Asked for together, they are read together, and long runs at the disk's
speed.
"""

import ctypes
import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PIECE_BYTES = 1 << 17  # of a longer range, Linux may read no more than this much

_C = ctypes.CDLL(None)
_C.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def read_ahead(array: NDArray[Any], rows: NDArray[np.int64], gap_bytes: int) -> None:
    """Ask for some rows, ascending, of an array in a mapped file, without waiting for them.

    gap_bytes: how much that nobody asked for may be read between two rows, to make one run of them.
    """
    if not len(rows):
        return
    row_bytes = array.strides[0]
    begin = array.ctypes.data + rows * row_bytes
    first = begin // mmap.PAGESIZE * mmap.PAGESIZE
    last = begin + row_bytes
    apart = np.flatnonzero(first[1:] > last[:-1] + gap_bytes)
    starts = first[np.concatenate([[0], apart + 1])]
    stops = last[np.concatenate([apart, [len(rows) - 1]])]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for piece in range(start, stop, _PIECE_BYTES):
            _C.madvise(piece, min(_PIECE_BYTES, stop - piece), mmap.MADV_WILLNEED)


def read_ahead_ranges(
    array: NDArray[Any], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> None:
    """Ask for ranges of rows, ascending, of an array in a mapped file; see `read_ahead`."""
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        if stop > start:
            read_ahead(array, np.array([start, stop - 1]), array.nbytes)
