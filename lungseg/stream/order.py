"""The order of training patches as a pure function of (seed, step), the same at any number of workers.

From large to small:

- A *pass* takes every row of the split once. Passes follow each other without a gap, and all their rows are
  cut into global batches of equal size. So no batch is incomplete and no row is left out: the few rows that a
  pass has left over begin the batch that the next pass fills up.
- Each rank takes its contiguous share of each global batch. So all ranks together see the same global
  batches, however many they are.
- A pass is made of *extents*, a few adjacent record batches each, which one GET fetches: a store answers few
  large requests sooner than many small ones. Extents come in shuffled order.
- As many extents are read side by side as record batches fit into a global batch: so many *lanes* there are.
  Each lane gives one record batch to each global batch, from the extent that it is reading. A lane belongs to
  one rank, and so do its extents: no two ranks fetch the same.

Positives are spread evenly over the pass, and each lane begins its extent at another point of it, so that no
global batch lacks them by bad luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lungseg.dataset.shuffle import _Draws
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


def training_batches(
    rows: Sequence[int],
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    positives: Sequence[int] | None = None,
    extents: Sequence[int] | None = None,
) -> Iterator[list[RowSlice]]:
    """This rank's share of global batch `first_step`, `first_step + 1`, … without end.

    `rows`, `positives` and `extents` are those of each record batch: how many rows it has, how many of them
    are positive (default: unknown), and the number of its extent (default: each is its own).
    Raises at once DataError("too-few-patches"), ConfigError("world-size") if the batch does not divide.
    """
    share = rows_per_rank(global_batch, world_size)
    steps_per_pass(rows, global_batch)
    total = sum(rows)

    @lru_cache(maxsize=2)
    def laid_out(pass_number: int) -> tuple[np.ndarray, np.ndarray]:
        order = pass_order(rows, positives, extents, global_batch, seed, pass_number)
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
    rows: Sequence[int],
    *,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    extents: Sequence[int] | None = None,
) -> Iterator[list[RowSlice]]:
    """Every row once, not shuffled, but woven; at the end a rank may get fewer rows than its share, or none.

    Raises at once ConfigError("world-size") if the batch does not divide.
    """
    share = rows_per_rank(global_batch, world_size)
    numbers = np.arange(len(rows))
    extent_of = numbers if extents is None else np.asarray(extents)
    order = _weave(extent_of, extent_of, numbers, _lanes(rows, global_batch))
    ends, total = np.cumsum(np.asarray(rows, np.int64)[order]), sum(rows)
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


def pass_order(
    rows: Sequence[int],
    positives: Sequence[int] | None,
    extents: Sequence[int] | None,
    global_batch: int,
    seed: int,
    pass_number: int,
) -> np.ndarray:
    """The numbers of all record batches in the order of a pass.

    Extents come first in which as many rows lie as in any, so that the lanes stay with the ranks for as
    long as possible.
    """
    count, draws = len(rows), _Draws(seed, pass_number)
    kinds = np.unique([0] * count if positives is None else positives, return_inverse=True)[1]
    extent_of = np.arange(count) if extents is None else np.unique(extents, return_inverse=True)[1]
    sizes = np.bincount(extent_of, rows)

    extent_kinds = np.unique(np.bincount(extent_of, kinds), return_inverse=True)[1]
    begins = draws.uniform(extent_kinds.max() + 1)[extent_kinds]
    positions = _evenly(np.zeros_like(extent_kinds), extent_kinds, begins, draws(len(sizes)))
    turn = np.empty(len(sizes), np.int64)  # of each extent in the pass
    turn[np.lexsort((positions, sizes < sizes.max()))] = np.arange(len(sizes))

    lanes = _lanes(rows, global_batch)
    window = turn[extent_of] // lanes
    phases = draws.uniform((window.max() + 1) * (kinds.max() + 1)).reshape(window.max() + 1, -1)
    inner = _evenly(extent_of, kinds, phases[window, kinds], draws(count))
    return _weave(turn[extent_of], extent_of, inner, lanes)


def _lanes(rows: Sequence[int], global_batch: int) -> int:
    return max(1, global_batch // max(rows, default=1))


def _evenly(groups: np.ndarray, kinds: np.ndarray, begins: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """A position in [0, 1) for each item, among the items of its group.

    The n items of one group and kind are shuffled by `draws` and lie 1/n apart; the first of them lies at
    `begins` of that distance. So any stretch of a group, in the order of positions, holds its share of each
    kind, to within two where there are two kinds.
    """
    order = np.lexsort((draws, kinds, groups))
    sorted_kinds, sorted_groups = kinds[order], groups[order]
    first = np.ones(len(order), bool)
    first[1:] = (sorted_kinds[1:] != sorted_kinds[:-1]) | (sorted_groups[1:] != sorted_groups[:-1])
    starts, members = np.flatnonzero(first), np.cumsum(first) - 1
    sizes = np.diff(np.append(starts, len(order)))
    positions = np.empty(len(order))
    positions[order] = (np.arange(len(order)) - starts[members] + begins[order]) / sizes[members]
    return positions


def _weave(turn: np.ndarray, extent_of: np.ndarray, inner: np.ndarray, lanes: int) -> np.ndarray:
    """The order of record batches. For each: `turn` is that of its extent, `inner` its position within it.

    Extents form windows of as many as there are lanes. Within a window the first record batch is taken from
    each lane, then the second from each, and so on. Each lane goes around its extent, and begins it one
    record batch away from where the lane before it does: so what is taken from all lanes at once is like a
    stretch of one extent, and holds its share of each kind.

    A last window of fewer extents than lanes is read one extent after the other: woven, its extents would
    wander over the ranks, and several would fetch each.
    """
    window, lane = np.divmod(turn, lanes)
    order = np.lexsort((inner, extent_of))
    sorted_extents = extent_of[order]
    begin = np.searchsorted(sorted_extents, sorted_extents)
    end = np.searchsorted(sorted_extents, sorted_extents, side="right")
    nth = np.empty(len(order), np.int64)
    nth[order] = (np.arange(len(order)) - begin + lane[order]) % (end - begin)
    last = window == (turn.max(initial=0) + 1) // lanes
    return np.lexsort((np.where(last, nth, lane), np.where(last, lane, nth), window))


def _cut(order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> list[RowSlice]:
    """The slices that hold rows [start, stop) of the record batches laid end to end in `order`; the k-th
    of them ends before row `ends[k]`."""
    slices = []
    k = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin = int(ends[k - 1]) if k else 0
        upto = min(stop, int(ends[k]))
        slices.append(RowSlice(int(order[k]), start - begin, upto - begin))
        start, k = upto, k + 1
    return slices
