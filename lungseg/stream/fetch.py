"""Record batches by number: fetched an extent at a time, verified, and decoded on threads.

A read that takes far longer than others get a second one beside it, and the first answer counts (Dean and
Barroso, "The Tail at Scale", 2013): all GPUs wait for the slowest read. Reads that are no longer wanted,
the slower one of two or all of them when the stream ends, are cut off at their socket.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Self

import numpy as np

from lungseg.config import StreamConfig
from lungseg.dataset import shards
from lungseg.dataset.shards import Buffer, Extent, RecordBatch
from lungseg.errors import LungsegError
from lungseg.storage import Patience, Read, ReadCancelled, Store
from lungseg.stream.cache import DiskCache
from lungseg.stream.order import RowSlice
from lungseg.stream.slabs import Slabs
from lungseg.telemetry import (
    CACHE_HITS,
    CACHE_MISSES,
    STREAM_BYTES,
    STREAM_GETS,
    STREAM_HEDGES,
    STREAM_RETRIES,
)


class Fetcher:
    """Use it in a `with` block: leaving it cuts off what is under way and joins every thread.

    At most `open_extents` that are fetched, or on their way, are kept for further requests; in the order of
    `order` all that is wanted of an extent is wanted within one window of it.
    """

    def __init__(
        self,
        store: Store,
        extents: Sequence[Extent],
        shape_zyx: tuple[int, int, int],
        config: StreamConfig,
        cache: DiskCache | None,
        open_extents: int,
    ) -> None:
        self._store, self._shape, self._cache = store, shape_zyx, cache
        self._refetches, self._most_open = config.refetches, open_extents
        self._extents = extents
        self._batches = [(number, batch) for number, e in enumerate(extents) for batch in e.batches]
        patience = Patience(config.retry_seconds, config.connect_seconds, config.read_seconds)
        self._slabs = Slabs(max((extent.length for extent in extents), default=0))
        self._reads = Reads(store, patience, config.hedge_factor, self._slabs)
        self._readers = ThreadPoolExecutor(config.threads, thread_name_prefix="lungseg-stream-read")
        # Decoding holds a core and not the network: more threads than cores would only take turns.
        cores = len(os.sched_getaffinity(0))
        self._decoders = ThreadPoolExecutor(min(4, cores), thread_name_prefix="lungseg-stream-decode")
        self._open: OrderedDict[int, Future[Buffer]] = OrderedDict()
        self._failed = threading.Event()

    def __enter__(self) -> Self:
        if self._cache:
            self._cache.open()
        self._reads.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reads.stop()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._decoders.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def submit(self, pieces: Sequence[RowSlice], image_hu: np.ndarray, mask: np.ndarray) -> Future[None]:
        """Decode one piece after another into int16 HU and uint8 masks, both [row, z, y, x]. After the first
        failure others are cancelled.

        The thread that decodes waits for the bytes: batches are wanted in this order, and those behind want
        the same extents, or later ones.
        """
        wanted = [(piece, *self._wanted(piece.record_batch)) for piece in pieces]
        return self._decoders.submit(self._decode, wanted, image_hu, mask)

    def _wanted(self, record_batch: int) -> tuple[Extent, RecordBatch, Future[Buffer]]:
        of, batch = self._batches[record_batch]
        if of not in self._open:
            self._open[of] = self._readers.submit(self._bytes, self._extents[of])
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return self._extents[of], batch, self._open[of]

    def _decode(
        self,
        wanted: Sequence[tuple[RowSlice, Extent, RecordBatch, Future[Buffer]]],
        image_hu: np.ndarray,
        mask: np.ndarray,
    ) -> None:
        row = 0
        for piece, extent, batch, fetched in wanted:
            upto = row + piece.stop - piece.start
            columns = shards.decode(extent.part(fetched.result(), batch), self._shape, extent.shard.codec)
            shards.copy_rows(columns, piece.start, piece.stop, image_hu[row:upto], mask[row:upto])
            row = upto

    def _bytes(self, extent: Extent) -> Buffer:
        if self._failed.is_set():
            raise CancelledError  # which nobody sees: the failure comes first in the order
        try:
            return self._cached(extent) if self._cache else self._fetch(extent)
        except BaseException:
            self._failed.set()  # or each read that waits in line would try a dead store all over again
            raise

    def _cached(self, extent: Extent) -> Buffer:
        assert self._cache is not None
        kept = self._slabs.take()[: extent.length].data
        if self._cache.get(extent, kept):
            CACHE_HITS.inc()
            return kept
        CACHE_MISSES.inc()
        data = self._fetch(extent)
        self._cache.put(extent, data)
        return data

    def _fetch(self, extent: Extent) -> Buffer:
        return shards.fetch(self._store, extent, self._refetches, self._reads.get)


class _Race:
    """One range that is being read, perhaps twice, each time into memory of its own."""

    def __init__(self, get: Callable[[Read], memoryview], patience: Patience) -> None:
        self.get = get
        self.began = time.monotonic()
        self.first = Read(patience)
        self.second: Read | None = None
        self.answer: memoryview | None = None  # the second read's, if that came first

    def cancel(self) -> None:
        self.first.cancel()
        if self.second:
            self.second.cancel()


class Reads:
    """Ranged reads of a store, hedged if it is remote, counted, and all of them stopped at once."""

    # A pace is known after so many reads; hedging sooner than this would answer noise with more load, and
    # more hedges than one in twenty reads would answer an overloaded server with more of it.
    _ENOUGH, _SOONEST_SECONDS, _SHARE = 20, 0.1, 0.05

    def __init__(self, store: Store, patience: Patience, factor: float, slabs: Slabs) -> None:
        self._store, self._patience, self._factor, self._slabs = store, patience, factor, slabs
        self._lock = threading.Lock()
        self._racing: set[_Race] = set()
        self._seconds: deque[float] = deque(maxlen=256)
        self._begun = self._hedged = 0
        self._stopped = threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self) -> None:
        if self._store.remote and self._factor:
            self._watcher = threading.Thread(target=self._watch, name="lungseg-stream-hedge")
            self._watcher.start()

    def stop(self) -> None:
        """Cut off every read; those still to come are refused with CancelledError."""
        with self._lock:
            self._stopped.set()
            for race in self._racing:
                race.cancel()
        if self._watcher:
            self._watcher.join()

    def get(self, key: str, start: int, length: int) -> memoryview:
        def into_a_slab(read: Read) -> memoryview:
            out = self._slabs.take()[:length].data
            self._store.get_into(key, start, out, read)
            return out

        race = _Race(into_a_slab, self._patience)
        with self._lock:
            if self._stopped.is_set():
                raise CancelledError
            self._racing.add(race)
            self._begun += 1
        try:
            data = race.get(race.first)
        except ReadCancelled:
            if race.answer is None:
                raise CancelledError from None
            data = race.answer
        finally:
            with self._lock:
                self._racing.discard(race)
            if race.second:
                race.second.cancel()
            STREAM_GETS.inc(race.first.attempts)
            STREAM_RETRIES.inc(max(0, race.first.attempts - 1))
        if race.first.attempts == 1:
            with self._lock:
                self._seconds.append(time.monotonic() - race.began)
        STREAM_BYTES.inc(len(data))
        return data

    def _watch(self) -> None:
        """Begin second reads, each on a thread of its own: they are rare."""
        helpers: list[threading.Thread] = []
        while not self._stopped.wait(self._SOONEST_SECONDS / 4):
            helpers = [helper for helper in helpers if helper.is_alive()]
            for race in self._slow():
                name = "lungseg-stream-second"
                helpers.append(threading.Thread(target=self._second, args=(race,), name=name))
                helpers[-1].start()
        for helper in helpers:
            helper.join()

    def _slow(self) -> list[_Race]:
        """Reads to be hedged now; notes that they are."""
        with self._lock:
            if self._stopped.is_set() or not self._racing or len(self._seconds) < self._ENOUGH:
                return []
            usual = sorted(self._seconds)[int(0.95 * len(self._seconds))]
            since = time.monotonic() - max(self._SOONEST_SECONDS, self._factor * usual)
            slow = [race for race in self._racing if not race.second and race.began < since]
            slow = slow[: max(0, 1 + int(self._SHARE * self._begun) - self._hedged)]
            for race in slow:
                race.second = Read(self._patience)
            self._hedged += len(slow)
        return slow

    def _second(self, race: _Race) -> None:
        assert race.second is not None
        STREAM_HEDGES.inc()
        try:
            answer = race.get(race.second)
        except (LungsegError, ReadCancelled):  # the first read says what is wrong, or got through
            return
        finally:
            STREAM_GETS.inc(race.second.attempts)
        with self._lock:
            if race in self._racing:
                race.answer = answer
                race.first.cancel()
