"""Record batches by number, fetched, verified and decoded on threads.

A read that takes far longer than others get a second one beside it, and the first answer counts (Dean and
Barroso, "The Tail at Scale", 2013): all GPUs wait for the slowest read. Reads that are no longer wanted,
the slower one of two or all of them when the stream ends, are cut off at their socket.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np

from lungseg.config import StreamConfig
from lungseg.data import shards
from lungseg.data.cache import DiskCache
from lungseg.data.shards import Shard
from lungseg.errors import LungsegError
from lungseg.storage import Patience, Read, ReadCancelled, Store
from lungseg.telemetry import (
    CACHE_HITS,
    CACHE_MISSES,
    STREAM_BYTES,
    STREAM_GETS,
    STREAM_HEDGES,
    STREAM_RETRIES,
)

Voxels = tuple[np.ndarray, np.ndarray]
"""Images (int16 HU) and masks (uint8) of a record batch, both [row, z, y, x]."""


class Fetcher:
    """Use it in a `with` block: leaving it cuts off what is under way and joins every thread."""

    def __init__(
        self,
        store: Store,
        batches: Sequence[tuple[Shard, int]],
        shape_zyx: tuple[int, int, int],
        config: StreamConfig,
        cache: DiskCache | None,
    ) -> None:
        self._store, self._batches, self._shape = store, batches, shape_zyx
        self._refetches, self._cache = config.refetches, cache
        patience = Patience(config.retry_seconds, config.connect_seconds, config.read_seconds)
        self._reads = Reads(store, patience, config.hedge_factor)
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="lungseg-stream")
        self._failed = threading.Event()

    def __enter__(self) -> Self:
        if self._cache:
            self._cache.open()
        self._reads.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reads.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, number: int) -> Future[Voxels]:
        """The voxels of a record batch, to come. After the first failure all others are cancelled."""
        return self._threads.submit(self._load, number)

    def _load(self, number: int) -> Voxels:
        if self._failed.is_set():
            raise CancelledError  # which nobody sees: the failure comes first in the order
        shard, within = self._batches[number]
        try:
            batch = shards.decode(self._bytes(shard, within), self._shape, shard.codec)
            return shards.images(batch), shards.masks(batch, self._shape)
        except BaseException:
            self._failed.set()  # or each read that waits in line would try a dead store all over again
            raise

    def _bytes(self, shard: Shard, within: int) -> bytes:
        fetch = partial(shards.fetch, self._store, shard, within, self._refetches, self._reads.get)
        if not self._cache:
            return fetch()
        place = shard.batches[within]
        data = self._cache.get(shard, place)
        if data is not None:
            CACHE_HITS.inc()
            return data
        CACHE_MISSES.inc()
        data = fetch()
        self._cache.put(shard, place, data)
        return data


class _Race:
    """One range that is being read, perhaps twice."""

    def __init__(self, get: Callable[[Read], bytes], patience: Patience) -> None:
        self.get = get
        self.began = time.monotonic()
        self.first = Read(patience)
        self.second: Read | None = None
        self.answer: bytes | None = None  # the second read's, if that came first

    def cancel(self) -> None:
        self.first.cancel()
        if self.second:
            self.second.cancel()


class Reads:
    """Ranged reads of a store, hedged if it is remote, counted, and all of them stopped at once."""

    # A pace is known after so many reads; hedging sooner than this would answer noise with more load, and
    # more hedges than one in twenty reads would answer an overloaded server with more of it.
    _ENOUGH, _SOONEST_SECONDS, _SHARE = 20, 0.1, 0.05

    def __init__(self, store: Store, patience: Patience, factor: float) -> None:
        self._store, self._patience, self._factor = store, patience, factor
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

    def get(self, key: str, start: int, length: int) -> bytes:
        race = _Race(partial(self._store.get, key, start, length), self._patience)
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
            STREAM_RETRIES.inc(race.first.attempts - 1)
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
