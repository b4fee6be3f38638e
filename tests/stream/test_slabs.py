"""Slabs: handed out again as soon as nobody holds a view, and never before."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungseg.stream.slabs import Slabs


def address(array: np.ndarray) -> int:
    return int(array.ctypes.data)


def test_what_nobody_holds_is_handed_out_again() -> None:
    slabs = Slabs(1000)
    first = slabs.take()
    where = address(first)
    assert (first.dtype, first.shape, where % 64) == (np.uint8, (1000,), 0)
    second = slabs.take()
    assert address(second) != where
    del first
    assert address(slabs.take()) == where


HOLDERS: dict[str, Callable[[np.ndarray], Any]] = {
    "a view": lambda slab: slab[10:20],
    "another type and shape": lambda slab: slab[:64].view(np.int16).reshape(4, 8),
    "a view of a view": lambda slab: slab.reshape(10, 100).T[3],
    "a memoryview": lambda slab: slab[:100].data,
    "a memoryview's part": lambda slab: memoryview(slab)[3:7],
    "an Arrow buffer": lambda slab: pa.py_buffer(slab[:100].data),
    "an Arrow array": lambda slab: pa.FixedShapeTensorArray.from_numpy_ndarray(slab.reshape(10, 100)),
    "np.split": lambda slab: np.split(slab, [100])[1],
    "a plain array of a view's memory": lambda slab: np.asarray(slab[10:].data)[5:],
    "as_strided": lambda slab: np.lib.stride_tricks.as_strided(slab[8:], (3, 3), (2, 1)),
    "torch's way, DLPack": lambda slab: np.from_dlpack(slab[64:128]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_whatever_looks_into_a_slab_holds_it(holder: str) -> None:
    slabs = Slabs(1000)
    slab = slabs.take()
    where = address(slab)
    held = HOLDERS[holder](slab)
    del slab
    assert address(slabs.take()) != where
    del held
    assert where in {address(one) for one in (slabs.take(), slabs.take())}


def test_a_tensor_that_tensorflow_made_without_a_copy_holds_its_slab() -> None:
    import tensorflow as tf

    slabs = Slabs(4096)
    slab = slabs.take()
    slab[:] = 7
    tensor = tf.convert_to_tensor(slab)
    del slab
    for _ in range(3):
        slabs.take()[:] = 9
    assert int(tf.reduce_sum(tf.cast(tensor, tf.int32))) == 7 * 4096


def test_a_slab_comes_back_where_it_was_held_in_a_circle() -> None:
    """Which only the garbage collector ends, and that may run anywhere, also within `take`."""
    slabs = Slabs(64)
    where = address(slabs.take())
    circle: list[Any] = [slabs.take()]
    circle.append(circle)
    del circle
    assert address(slabs.take()) != where
    gc.collect()
    assert where in {address(one) for one in (slabs.take(), slabs.take())}


@given(st.lists(st.integers(0, 5), max_size=60))
def test_no_two_holders_ever_share_a_slab_and_there_are_no_more_than_were_held_at_once(
    steps: list[int],
) -> None:
    slabs, held, most = Slabs(64), {}, 0
    for step, key in enumerate(steps):
        if key in held:
            slab, value = held.pop(key)
            assert (slab == value).all()
            del slab
        else:
            held[key] = slabs.take(), step % 256
            held[key][0][:] = step % 256
        most = max(most, len(held))
    assert all((slab == value).all() for slab, value in held.values())
    held.clear()
    assert slabs._free.qsize() == most


def test_threads_that_take_and_let_go_never_meet() -> None:
    slabs, wrong = Slabs(256), []

    def work(value: int) -> None:
        for _ in range(3000):
            slab = slabs.take()
            slab[:] = value
            if not (slab == value).all():
                wrong.append(value)
            del slab

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert slabs._free.qsize() <= 8
