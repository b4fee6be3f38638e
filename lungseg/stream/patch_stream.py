"""Patches from the store as batches of fixed shape, fetched and decoded ahead of the step that needs them.

Record batches are fetched in parallel by ranged GETs, verified, and decoded into their batches on
threads; the next batches wait in memory up to a bound in bytes. The order is that of `order`, whatever
arrives first.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from lungseg.config import StreamConfig
from lungseg.dataset.case import IGNORE
from lungseg.dataset.manifest import Manifest
from lungseg.storage import Store
from lungseg.stream import order
from lungseg.stream.cache import DiskCache
from lungseg.stream.fetch import Fetcher
from lungseg.stream.slabs import Slabs
from lungseg.telemetry import QUEUE_DEPTH, STREAM_PATCHES, STREAM_WAIT_SECONDS


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
    """An iterator of `Batch`. Use it in a `with` block: leaving it stops every thread, also on an error,
    and cuts off reads that are under way.

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
        self._store, self._config, self._shape = store, config, manifest.patch_shape_zyx
        self._extents = manifest.extents(split)
        self._in_use = [shard for shards in manifest.shards.values() for shard in shards]
        self._share = order.rows_per_rank(global_batch, world_size)
        self._first_row = rank * self._share
        rows = manifest.rows(split)
        numbers = [number for number, extent in enumerate(self._extents) for _ in extent.batches]
        share: dict[str, Any] = {"global_batch": global_batch, "rank": rank, "world_size": world_size}
        share |= {"extents": numbers}
        if training:
            share |= {"seed": seed, "first_step": first_step, "positives": manifest.positives(split)}
        plan = (order.training_batches if training else order.evaluation_batches)(rows, **share)
        self._plan = enumerate(plan, first_step)
        # In a batch of mine so many record batches meet at most, each from its own extent; in the next one
        # the window may be another.
        meeting = 1 + -(-self._share // max(rows, default=1))
        self._open_extents = 2 * meeting
        largest = max((extent.length for extent in self._extents), default=0)
        row_bytes = 3 * math.prod(self._shape) + max(
            (-(-extent.length // sum(b.rows for b in extent.batches)) for extent in self._extents), default=0
        )
        # What waits are batches, and the extents that they are cut from, as they were stored.
        fits = ((config.prefetch_mib << 20) - self._open_extents * largest) // (self._share * row_bytes)
        # Of tiny patches a million would fit; more than keep all threads busy for a while helps nobody.
        self._ahead = min(max(1, fits), 4 * config.threads)
        self._slabs = Slabs(3 * self._share * math.prod(self._shape))
        self._waiting: deque[tuple[Batch, Future[None]]] = deque()
        self._fetcher: Fetcher | None = None
        self.waited_seconds = 0.0

    def __enter__(self) -> Self:
        config = self._config
        cache = None
        if config.cache_dir:
            cache = DiskCache(config.cache_dir, int(config.cache_gib * (1 << 30)), self._in_use)
        fetcher = Fetcher(self._store, self._extents, self._shape, config, cache, self._open_extents)
        self._fetcher = fetcher.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._fetcher is not None
        self._fetcher.__exit__()
        self._fetcher = None
        self._waiting.clear()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self._fill()
            if not self._waiting:
                return
            QUEUE_DEPTH.set(sum(decoded.done() for _, decoded in self._waiting))
            began = time.perf_counter()
            batch, decoded = self._waiting.popleft()
            decoded.result()
            waited = time.perf_counter() - began
            self.waited_seconds += waited
            STREAM_WAIT_SECONDS.inc(waited)
            STREAM_PATCHES.inc(self._share)
            yield batch

    def dataset(self) -> Any:
        """A tf.data.Dataset of whole batches (step, first row, image_hu, mask), all of static shapes.

        An error of the stream comes out of it as tf.errors.OpError, and is quoted there.
        """
        import tensorflow as tf

        shape = (self._share, *self._shape)
        number = tf.TensorSpec((), tf.int64)
        signature = (number, number, tf.TensorSpec(shape, tf.int16), tf.TensorSpec(shape, tf.uint8))
        batches = lambda: ((b.step, b.first_row, b.image_hu, b.mask) for b in self)  # noqa: E731
        return tf.data.Dataset.from_generator(batches, output_signature=signature)

    def _fill(self) -> None:
        if self._fetcher is None:
            raise RuntimeError("a PatchStream is iterated inside its `with` block")
        while len(self._waiting) < self._ahead:
            step, pieces = next(self._plan, (-1, None))
            if pieces is None:
                return
            image, mask = self._empty()
            rows = sum(piece.stop - piece.start for piece in pieces)
            image[rows:], mask[rows:] = 0, IGNORE
            decoded = self._fetcher.submit(pieces, image[:rows], mask[:rows])
            self._waiting.append((Batch(step, self._first_row, image, mask), decoded))

    def _empty(self) -> tuple[np.ndarray, np.ndarray]:
        shape, slab = (self._share, *self._shape), self._slabs.take()
        image, mask = slab[: len(slab) // 3 * 2], slab[len(slab) // 3 * 2 :]
        return image.view(np.int16).reshape(shape), mask.reshape(shape)
