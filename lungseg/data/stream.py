"""Patches from the store as batches of fixed shape, fetched and decoded ahead of the step that needs them.

Record batches are fetched in parallel by ranged GETs, verified and decoded on threads; the next batches
wait in memory up to a bound in bytes. The order is that of `order`, whatever arrives first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lungseg.config import StreamConfig
from lungseg.data import order, shards
from lungseg.data.order import RowSlice
from lungseg.data.shards import IGNORE, Manifest
from lungseg.storage import Store

Decoded = Future[tuple[np.ndarray, np.ndarray]]
"""Images and masks of a record batch that is being fetched."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch: `image_hu` int16 and `mask` uint8, both [n, z, y, x].

    `first_row` is the number of its first row within the global batch.
    """

    step: int
    first_row: int
    image_hu: np.ndarray
    mask: np.ndarray


class PatchStream:
    """An iterator of `Batch`. Use it in a `with` block: leaving it stops every thread, also on an error.

    Training batches go on for ever from `first_step`; evaluation gives every row once and fills up the
    last batch with rows that are IGNORE throughout, so that shapes stay static and counts stay right.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        split: str,
        config: StreamConfig,
        *,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_step: int = 0,
        training: bool = True,
    ) -> None:
        self._store, self._config = store, config
        self._batches = manifest.record_batches(split)
        self._layout = shards.schema(manifest.patch_shape_zyx)
        self._shape = manifest.patch_shape_zyx
        self._share = order.rows_per_rank(global_batch, world_size)
        self._first_row = rank * self._share
        place: dict[str, Any] = {"global_batch": global_batch, "rank": rank, "world_size": world_size}
        rows = manifest.rows(split)
        plan = (
            order.training_batches(rows, seed=seed, first_step=first_step, **place)
            if training
            else order.evaluation_batches(rows, **place)
        )
        self._plan = enumerate(plan, first_step)
        # A batch may take a single row of its first and of its last record batch, which wait as a whole.
        rows_held = self._share + 2 * (max(rows, default=1) - 1)
        patch_bytes = 3 * int(np.prod(self._shape))
        fits = (config.prefetch_mib << 20) // (rows_held * patch_bytes)
        # Of tiny patches a million would fit; more than keep all threads busy for a while helps nobody.
        self._ahead = min(max(1, fits), 4 * config.threads)
        self._waiting: deque[tuple[int, list[tuple[RowSlice, Decoded]]]] = deque()
        self._newest: tuple[int, Decoded] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._failed = threading.Event()
        self.waited_seconds = 0.0

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self._config.threads, thread_name_prefix="lungseg-stream")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._threads is not None
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._threads = self._newest = None
        self._waiting.clear()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._fill()
            if not self._waiting:
                return
            began = time.perf_counter()
            step, pieces = self._waiting.popleft()
            batch = self._assemble(step, [(piece, decoded.result()) for piece, decoded in pieces])
            self.waited_seconds += time.perf_counter() - began
            yield batch

    def _fill(self) -> None:
        while len(self._waiting) < self._ahead:
            step, pieces = next(self._plan, (-1, None))
            if pieces is None:
                return
            self._waiting.append((step, [(piece, self._decoded(piece.record_batch)) for piece in pieces]))

    def _decoded(self, number: int) -> Decoded:
        """The arrays of a record batch, to come; one fetch where it spans two batches."""
        if self._threads is None:
            raise RuntimeError("a PatchStream is iterated inside its `with` block")
        if self._newest is None or self._newest[0] != number:
            self._newest = number, self._threads.submit(self._load, number)
        return self._newest[1]

    def _load(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._failed.is_set():
            raise CancelledError  # which nobody sees: the failure comes first in the order
        shard, within = self._batches[number]
        try:
            batch = shards.read_record_batch(self._store, shard, within, self._layout, self._config.refetches)
        except BaseException:
            self._failed.set()  # or each read that waits in line would try a dead store all over again
            raise
        return shards.tensors(batch, "image"), shards.tensors(batch, "mask")

    def _assemble(self, step: int, pieces: list[tuple[RowSlice, tuple[np.ndarray, np.ndarray]]]) -> Batch:
        image = np.zeros((self._share, *self._shape), np.int16)
        mask = np.full((self._share, *self._shape), IGNORE, np.uint8)
        row = 0
        for piece, (images, masks) in pieces:
            upto = row + piece.stop - piece.start
            image[row:upto] = images[piece.start : piece.stop]
            mask[row:upto] = masks[piece.start : piece.stop]
            row = upto
        return Batch(step, self._first_row, image, mask)
