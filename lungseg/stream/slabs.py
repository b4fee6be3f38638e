"""Memory that is used again.

A fresh array costs a page fault for every 4 KiB, and the kernel zeroes the page: more time than decoding
into it takes. So batches and fetched bytes lie in slabs, and a slab that nobody looks into any more is handed
out again.

Each time it is lent by a new object, which every view keeps alive, also one that TensorFlow or Arrow made
without a copy. That object is not an array: NumPy lets views of views skip the arrays between them and the
memory, but nothing else. When it goes, the memory comes back.
"""

from __future__ import annotations

import ctypes
import queue
import weakref

import numpy as np

_ALIGNMENT = 64  # TensorFlow takes what is so aligned without a copy


class Slabs:
    """Arrays of `size` bytes; as many as are in use at once, and none is given back."""

    def __init__(self, size: int) -> None:
        self._lent = ctypes.c_uint8 * size
        # Of all queues the one whose `put` may interrupt itself, as a finalizer may anywhere.
        self._free: queue.SimpleQueue[tuple[np.ndarray, int]] = queue.SimpleQueue()

    def take(self) -> np.ndarray:
        """uint8 [size], of undefined content."""
        try:
            memory, begin = self._free.get_nowait()
        except queue.Empty:
            memory = np.empty(ctypes.sizeof(self._lent) + _ALIGNMENT, np.uint8)
            begin = memory.ctypes.data + -memory.ctypes.data % _ALIGNMENT
        lent = self._lent.from_address(begin)
        weakref.finalize(lent, self._free.put, (memory, begin)).atexit = False
        return np.frombuffer(lent, np.uint8)
