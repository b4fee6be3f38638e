"""The order of training patches as a pure function of (seed, step), the same at any number of workers.

A split is a list of record batches of known row counts. A *pass* visits each of them once in a shuffled
order; the rows of a pass, laid end to end, are cut into global batches of equal size, and every rank
takes its contiguous share of each. What is left at the end of a pass, fewer rows than one global batch,
is not trained on in that pass; the shuffle of the next pass leaves out other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.errors import ConfigError, DataError


@dataclass(frozen=True)
class RowSlice:
    """Rows [start, stop) of record batch number `record_batch` of the split."""

    record_batch: int
    start: int
    stop: int


def steps_per_pass(rows: Sequence[int], global_batch: int) -> int:
    """Whole global batches in one pass. Raises DataError("too-few-patches") if there is none."""
    steps = sum(rows) // global_batch
    if not steps:
        raise DataError(
            "too-few-patches",
            patches=sum(rows),
            global_batch=global_batch,
            remedy="lower train.global_batch or prepare more scans",
        )
    return steps


def permutation(count: int, seed: int, pass_number: int) -> np.ndarray:
    """A shuffle of range(count). Philox's raw stream is fixed for ever (NEP 19), unlike
    Generator.permutation, so a run can be resumed under another NumPy."""
    raw = np.random.Philox(key=np.array([seed, pass_number], dtype=np.uint64)).random_raw(count)
    return np.argsort(raw, kind="stable")


def training_batches(
    rows: Sequence[int],
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
) -> Iterator[list[RowSlice]]:
    """This rank's share of global batch `first_step`, `first_step + 1`, … without end.

    Raises at once DataError("too-few-patches"), ConfigError("world-size") if the batch does not divide.
    """
    share = rows_per_rank(global_batch, world_size)
    per_pass = steps_per_pass(rows, global_batch)

    def batches() -> Iterator[list[RowSlice]]:
        pass_number, within = divmod(first_step, per_pass)
        while True:
            order = permutation(len(rows), seed, pass_number)
            ends = np.cumsum(np.asarray(rows)[order])
            for number in range(within, per_pass):
                start = number * global_batch + rank * share
                yield _cut(order, ends, start, start + share)
            pass_number, within = pass_number + 1, 0

    return batches()


def evaluation_batches(
    rows: Sequence[int], *, global_batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[list[RowSlice]]:
    """Every row once, unshuffled; at the end a rank may get fewer rows than its share, or none.

    Raises at once ConfigError("world-size") if the batch does not divide.
    """
    share = rows_per_rank(global_batch, world_size)
    order, ends, total = np.arange(len(rows)), np.cumsum(rows), sum(rows)
    starts = (min(first + rank * share, total) for first in range(0, total, global_batch))
    return (_cut(order, ends, start, min(start + share, total)) for start in starts)


def rows_per_rank(global_batch: int, world_size: int) -> int:
    """Each rank's share of a global batch. Raises ConfigError("world-size") if it does not divide."""
    if global_batch % world_size:
        raise ConfigError(
            "world-size",
            global_batch=global_batch,
            world_size=world_size,
            remedy="choose a train.global_batch that the workers divide",
        )
    return global_batch // world_size


def _cut(order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[RowSlice]:
    """The slices that hold rows [start, stop) of the record batches laid end to end in `order`; the k-th
    of them ends before row `ends[k]`."""
    slices = []
    position = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin = int(ends[position - 1]) if position else 0
        upto = min(stop, int(ends[position]))
        slices.append(RowSlice(int(order[position]), start - begin, upto - begin))
        start, position = upto, position + 1
    return slices
