"""Memory that is used again.

A fresh array costs a page fault for every 4 KiB, and the kernel zeroes the page: more time than decoding
into it takes. So batches and fetched bytes lie in slabs, and a slab that nobody holds a view of any more is
handed out again. Who holds one is asked of CPython's reference counts; every view of an array, also one
that TensorFlow or Arrow made without a copy, keeps a reference to the slab.
"""

from __future__ import annotations

import sys
import threading

import numpy as np

_ALIGNMENT = 64  # TensorFlow takes what is so aligned without a copy


class Slabs:
    """Arrays of `size` bytes; as many as are in use at once, and none is given back."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._slabs: list[np.ndarray] = []
        self._begins: list[int] = []  # where each is aligned

    def take(self) -> np.ndarray:
        """uint8 [size], of undefined content."""
        with self._lock:
            for number in range(len(self._slabs)):
                if sys.getrefcount(self._slabs[number]) == 2:  # the list's reference, and that of the call
                    break
            else:
                number = len(self._slabs)
                self._slabs.append(np.empty(self._size + _ALIGNMENT, np.uint8))
                self._begins.append(-self._slabs[number].ctypes.data % _ALIGNMENT)
            begin = self._begins[number]
            return self._slabs[number][begin : begin + self._size]
