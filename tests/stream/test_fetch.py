"""Slow reads get a second one, unwanted reads are cut off, and every read is counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.faults import FaultProxy, fault_proxy
from helpers.servers import BUCKET, S3Server

from lungseg.config import StreamConfig
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.shards import Patch, write_shard
from lungseg.errors import StorageError
from lungseg.storage import Patience, Read, ReadCancelled, S3Store, open_store
from lungseg.stream.fetch import Fetcher, Reads
from lungseg.stream.order import RowSlice
from lungseg.stream.patch_stream import PatchStream
from lungseg.stream.slabs import Slabs
from lungseg.telemetry import (
    CACHE_HITS,
    CACHE_MISSES,
    CHECKSUM_FAILURES,
    QUEUE_DEPTH,
    STREAM_BYTES,
    STREAM_GETS,
    STREAM_HEDGES,
    STREAM_PATCHES,
    STREAM_RETRIES,
    STREAM_WAIT_SECONDS,
)

pytestmark = pytest.mark.timeout(60)
SHAPE = (8, 8, 8)
LATE_SECONDS = 3.0


class Counted:
    """How far each metric has gone since this object was made."""

    def __init__(self) -> None:
        self.before = self._now()

    def _now(self) -> dict[str, float]:
        metrics = {
            "bytes": STREAM_BYTES, "gets": STREAM_GETS, "retries": STREAM_RETRIES, "hedges": STREAM_HEDGES,
            "hits": CACHE_HITS, "misses": CACHE_MISSES, "patches": STREAM_PATCHES,
            "checksums": CHECKSUM_FAILURES, "waited": STREAM_WAIT_SECONDS,
        }  # fmt: skip
        return {name: metric._value.get() for name, metric in metrics.items()}

    def __getitem__(self, name: str) -> float:
        return self._now()[name] - self.before[name]


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lungseg-stream")]


@pytest.fixture
def late(
    s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[S3Store, FaultProxy]]:
    """A store behind a proxy that can answer late, with one object of 64 bytes that differ."""
    open_store(s3_uri).put("key", bytes(range(64)))
    with fault_proxy(s3_server.endpoint, LATE_SECONDS) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield S3Store(BUCKET, s3_uri.removeprefix(f"s3://{BUCKET}/")), proxy


@pytest.fixture
def reads(late: tuple[S3Store, FaultProxy]) -> Iterator[Reads]:
    """Reads that know how fast the store is."""
    reads = Reads(late[0], Patience(), 3.0, Slabs(64))
    reads.start()
    for start in range(24):
        assert reads.get("key", start, 1) == bytes([start])
    yield reads
    reads.stop()


@pytest.mark.alone
@pytest.mark.parametrize("fault", ["slow-first-byte", "stall"])
def test_a_slow_read_gets_a_second_one_and_the_first_answer_counts(
    late: tuple[S3Store, FaultProxy], reads: Reads, fault: str
) -> None:
    counted = Counted()
    late[1].script["GET"].append(fault)  # type: ignore[arg-type]
    began = time.monotonic()
    assert reads.get("key", 7, 4) == bytes([7, 8, 9, 10])
    assert time.monotonic() - began < LATE_SECONDS / 2
    reads.stop()  # joins the second read, whose count comes last
    assert (counted["hedges"], counted["gets"], counted["bytes"]) == (1, 2, 4)
    assert not our_threads()


@pytest.mark.alone
def test_the_first_read_wins_where_the_second_one_is_slower_still(
    late: tuple[S3Store, FaultProxy], reads: Reads
) -> None:
    proxy = late[1]
    proxy.late_seconds = 0.6
    proxy.script["GET"].extend(["slow-first-byte", "stall"])
    began = time.monotonic()
    assert reads.get("key", 0, 2) == bytes([0, 1])
    assert 0.5 < time.monotonic() - began < 2
    began = time.monotonic()
    reads.stop()  # the stalled one was cut off
    assert time.monotonic() - began < 5


def test_an_answer_of_the_second_read_that_is_an_error_changes_nothing(
    late: tuple[S3Store, FaultProxy], reads: Reads
) -> None:
    proxy = late[1]
    proxy.late_seconds = 0.6
    proxy.script["GET"].extend(["slow-first-byte", "403"])
    assert reads.get("key", 0, 2) == bytes([0, 1])


def test_hedges_are_few_where_everything_is_slow(late: tuple[S3Store, FaultProxy], reads: Reads) -> None:
    proxy = late[1]
    proxy.late_seconds = 0.4
    proxy.always["GET"] = "slow-first-byte"
    counted = Counted()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda start: reads.get("key", start, 1), range(32)))
    # 24 quick reads were known; one in twenty of 56, and one.
    assert 1 <= counted["hedges"] <= 3


def test_a_factor_of_zero_hedges_never_and_a_folder_neither(
    late: tuple[S3Store, FaultProxy], tmp_path: Path
) -> None:
    for store, factor in ((late[0], 0.0), (open_store(tmp_path), 3.0)):
        reads = Reads(store, Patience(), factor, Slabs(64))
        reads.start()
        assert not our_threads()
        reads.stop()


@pytest.mark.alone
@pytest.mark.parametrize("fault", ["slow-first-byte", "stall", "503"])
def test_stopping_cuts_off_reads_wherever_they_are(late: tuple[S3Store, FaultProxy], fault: str) -> None:
    """Before the first byte, in the middle of the body, and in the pause before another try."""
    store, proxy = late
    proxy.late_seconds = 30
    proxy.always["GET"] = fault  # type: ignore[assignment]
    reads = Reads(store, Patience(first_wait_seconds=20, longest_wait_seconds=20), 3.0, Slabs(64))
    reads.start()
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(reads.get, "key", 0, 8)
        while not proxy.seen:
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        reads.stop()
        with pytest.raises(CancelledError):
            under_way.result()
        assert time.monotonic() - began < 5
    with pytest.raises(CancelledError):
        reads.get("key", 0, 8)


def test_a_cancelled_read_leaves_others_alone(late: tuple[S3Store, FaultProxy]) -> None:
    store, proxy = late
    proxy.late_seconds = 3.0
    proxy.script["GET"].extend(["slow-first-byte", "slow-first-byte"])
    one, other = Read(), Read()
    with ThreadPoolExecutor(2) as pool:
        outs = [memoryview(bytearray(8)) for _ in range(2)]
        cut = pool.submit(store.get_into, "key", 0, outs[0], one)
        kept = pool.submit(store.get_into, "key", 0, outs[1], other)
        while len(proxy.seen) < 2:
            time.sleep(0.01)
        one.cancel()
        with pytest.raises(ReadCancelled):
            cut.result(timeout=2)
        kept.result()
        assert outs[1] == bytes(range(8))
    one.cancel()  # ended long ago
    assert store.get("key", 1, 1) == b"\x01"


def data_set(uri: str, batches: int = 6) -> Manifest:
    mask = np.zeros(SHAPE, np.uint8)
    patches = [
        [Patch(np.full(SHAPE, number, np.int16), mask, "c", "", "lung", (0, 0, 0), (1, 1, 1))] * 2
        for number in range(batches)
    ]
    shard = write_shard(open_store(uri), "data/d/shards/train-00000.arrow", patches, SHAPE, "planes-lz4")
    return Manifest("d", "", {}, SHAPE, {"train": (shard,)}, {}, {}, {}, ())


@pytest.mark.alone
def test_every_metric_says_what_happened(
    late: tuple[S3Store, FaultProxy], s3_uri: str, tmp_path: Path
) -> None:
    store, proxy = late
    manifest = data_set(s3_uri)
    config = StreamConfig(threads=1, cache_dir=tmp_path / "cache")
    stored = sum(batch.bytes for batch in manifest.shards["train"][0].batches)
    proxy.late_seconds = 0.4
    proxy.script["GET"].extend([None, "reset", None, "flip", "slow-first-byte"])
    counted = Counted()
    share = {"global_batch": 2, "training": False}
    with PatchStream(store, manifest, "train", config, **share) as stream:  # type: ignore[arg-type]
        assert len(list(stream)) == 6
    flipped = manifest.shards["train"][0].batches[2].bytes
    assert counted["patches"] == 12
    assert (counted["gets"], counted["retries"], counted["checksums"]) == (8, 1, 1)
    assert counted["bytes"] == stored + flipped
    assert (counted["hits"], counted["misses"]) == (0, 6)
    assert 0.4 < counted["waited"] < 5
    assert counted["waited"] == pytest.approx(stream.waited_seconds)
    counted = Counted()
    with PatchStream(store, manifest, "train", config, **share) as stream:  # type: ignore[arg-type]
        batches = iter(stream)
        next(batches)
        time.sleep(0.3)
        next(batches)
        assert QUEUE_DEPTH._value.get() in (3, 4)  # one thread works four ahead; the fourth was just begun
        until = time.monotonic() + 60
        while counted["hits"] < 5 and time.monotonic() < until:  # leaving the stream would cancel the fifth
            time.sleep(0.01)
    assert (counted["gets"], counted["bytes"], counted["hits"]) == (0, 0, 5)


def test_a_changed_byte_in_the_cache_is_fetched_again(s3_uri: str, tmp_path: Path) -> None:
    manifest = data_set(s3_uri)
    config = StreamConfig(cache_dir=tmp_path)

    def epoch() -> list[int]:
        with PatchStream(
            open_store(s3_uri), manifest, "train", config, global_batch=2, training=False
        ) as stream:
            return [int(batch.image_hu[0, 0, 0, 0]) for batch in stream]

    assert epoch() == list(range(6))
    for path in tmp_path.glob("*/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(bytes(data))
    counted = Counted()
    assert epoch() == list(range(6))
    assert (counted["checksums"], counted["gets"]) == (6, 6)
    assert epoch() == list(range(6))
    assert counted["hits"] == 6


def test_after_a_failure_no_further_read_is_begun(s3_uri: str) -> None:
    manifest = data_set(s3_uri)
    store = open_store(s3_uri)
    store.delete(["data/d/shards/train-00000.arrow"])
    counted = Counted()
    with Fetcher(store, manifest.extents("train"), SHAPE, StreamConfig(threads=1), None, 1) as fetcher:
        out = np.empty((2, *SHAPE), np.int16), np.empty((2, *SHAPE), np.uint8)
        ended = [fetcher.submit([RowSlice(number, 0, 2)], *out) for number in range(6)]
        errors = [one.exception(timeout=60) for one in ended]
        assert isinstance(errors[0], StorageError)
        assert errors[0].code == "object-missing"
        assert [type(error) for error in errors[1:]] == [CancelledError] * 5
    assert counted["gets"] == 1
