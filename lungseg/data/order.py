"""The order of training patches as a pure function of (seed, step), the same at any number of workers.

A split is a list of record batches of known row counts. A *pass* visits each of them once in a shuffled
order. The rows of all passes, laid end to end without a gap, are cut into global batches of equal size,
and every rank takes its contiguous share of each. So no batch is ever incomplete and no row is left out:
what a pass leaves over, fewer rows than one global batch, begins the batch that the next pass goes on with.

The shuffle spreads the positives: every run of record batches holds the share of them that the whole split
has, to within about one record batch's, so no global batch is without them by bad luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    return np.argsort(_draws(count, seed, pass_number), kind="stable")


def spread(positives: Sequence[int], seed: int, pass_number: int) -> np.ndarray:
    """A shuffle of record batches with these numbers of positives that deals them out evenly.

    Record batches of equal number form a class. Each class is shuffled and laid evenly over the pass, from
    a random beginning; so in every run of k record batches the k/n-th part of a class is found, to within
    two for two classes (which is what `prepare` makes, but for a ragged last one).
    """
    kinds, kind_of = np.unique(np.asarray(positives, np.int64), return_inverse=True)
    draws = _draws(len(positives) + len(kinds), seed, pass_number)
    begins = (draws[len(positives) :] >> np.uint64(11)).astype(np.float64) / 2**53
    place = np.empty(len(positives))
    for kind, begin in enumerate(begins):
        members = np.flatnonzero(kind_of == kind)
        shuffled = members[np.argsort(draws[members], kind="stable")]
        place[shuffled] = (np.arange(len(members)) + begin) / len(members)
    return np.argsort(place, kind="stable")


def training_batches(
    rows: Sequence[int],
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    positives: Sequence[int] | None = None,
) -> Iterator[list[RowSlice]]:
    """This rank's share of global batch `first_step`, `first_step + 1`, … without end.

    `positives` are those of each record batch; without them the shuffle knows of none.
    Raises at once DataError("too-few-patches"), ConfigError("world-size") if the batch does not divide.
    """
    share = rows_per_rank(global_batch, world_size)
    steps_per_pass(rows, global_batch)
    total, kinds = sum(rows), positives or [0] * len(rows)

    @lru_cache(maxsize=2)
    def laid_out(pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        order = spread(kinds, seed, pass_number)
        return order, np.cumsum(np.asarray(rows)[order])

    def batch(start: int, stop: int) -> list[RowSlice]:
        slices = []
        while start < stop:
            pass_number, within = divmod(start, total)
            upto = min(total, within + stop - start)
            slices += _cut(*laid_out(pass_number), within, upto)
            start += upto - within
        return slices

    def batches() -> Iterator[list[RowSlice]]:
        start = first_step * global_batch + rank * share
        while True:
            yield batch(start, start + share)
            start += global_batch

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
    """Each rank's share of a global batch. Raises ConfigError("world-size") if it does not divide: ranks
    with fewer rows than others would wait for them in every step, and weigh more in the gradient."""
    if global_batch % world_size:
        fitting = [n for n in range(1, global_batch + 1) if not global_batch % n]
        nearest = sorted(fitting, key=lambda n: abs(n - world_size))[:2]
        above = global_batch + -global_batch % world_size
        raise ConfigError(
            "world-size",
            global_batch=global_batch,
            world_size=world_size,
            remedy=f"train with {' or '.join(map(str, sorted(nearest)))} workers, "
            f"or set train.global_batch to {above}",
        )
    return global_batch // world_size


def _draws(count: int, seed: int, pass_number: int) -> np.ndarray:
    key = np.array([seed, pass_number], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)


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
