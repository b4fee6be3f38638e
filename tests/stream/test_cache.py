"""The disk cache: verified on every read, bounded, shared by processes that may be killed at any time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.dataset.shards import Extent, Patch, Shard, write_shard
from lungseg.errors import ConfigError
from lungseg.storage import FolderStore
from lungseg.stream.cache import DiskCache
from lungseg.telemetry import CHECKSUM_FAILURES

SHAPE = (8, 8, 8)
HOUR_AGO = time.time() - 4000


def shard_of(store: FolderStore, number: int, batches: int = 4) -> Shard:
    rng = np.random.default_rng(number)
    patches = [
        [Patch(rng.integers(-1000, 400, SHAPE, np.int16), np.zeros(SHAPE, np.uint8), "c", "", "lung",
               (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))]
        for _ in range(batches)
    ]  # fmt: skip
    return write_shard(store, f"s{number}", patches, SHAPE, "raw")


def extents_of(shard: Shard) -> list[Extent]:
    """Of one record batch each."""
    return [Extent(shard, number, number + 1) for number in range(len(shard.batches))]


def data_of(store: FolderStore, extent: Extent) -> bytes:
    return store.get(extent.shard.key, extent.offset, extent.length)


def held_by(cache: DiskCache, extent: Extent) -> bytes | None:
    out = bytearray(extent.length)
    return bytes(out) if cache.get(extent, memoryview(out)) else None


def opened(folder: Path, limit: int, *shards: Shard) -> DiskCache:
    cache = DiskCache(folder, limit, shards)
    cache.open()
    return cache


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*") if path.is_file()]


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def fill(store: FolderStore, cache: DiskCache, shard: Shard) -> None:
    for extent in extents_of(shard):
        cache.put(extent, data_of(store, extent))


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_what_was_put_is_found_again_by_another_process_and_after_a_restart(
    tmp_path: Path, store: FolderStore
) -> None:
    shard = shard_of(store, 0)
    cache = opened(tmp_path / "cache", 1 << 20, shard)
    assert held_by(cache, Extent(shard, 0, 1)) is None
    fill(store, cache, shard)
    again = opened(tmp_path / "cache", 1 << 20)
    for extent in extents_of(shard):
        assert held_by(cache, extent) == held_by(again, extent) == data_of(store, extent)
    longer = Extent(shard, 0, 3)
    assert held_by(cache, longer) is None
    cache.put(longer, data_of(store, longer))
    assert held_by(again, longer) == data_of(store, longer)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_an_entry_whose_bytes_changed_is_counted_removed_and_not_given(
    tmp_path: Path, store: FolderStore, damage: str
) -> None:
    shard = shard_of(store, 0, 1)
    cache = opened(tmp_path / "cache", 1 << 20, shard)
    fill(store, cache, shard)
    (path,) = files(tmp_path / "cache")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:50]), "empty": b""}[damage])
    before = CHECKSUM_FAILURES._value.get()
    assert held_by(cache, Extent(shard, 0, 1)) is None
    assert CHECKSUM_FAILURES._value.get() == before + 1
    assert not files(tmp_path / "cache")


def test_a_full_cache_keeps_what_it_has_of_the_data_set_in_use(tmp_path: Path, store: FolderStore) -> None:
    shard = shard_of(store, 0, 8)
    size = shard.batches[0].bytes
    cache = opened(tmp_path / "cache", 3 * size + size // 2, shard)
    fill(store, cache, shard)
    for path in files(tmp_path / "cache"):
        os.utime(path, (HOUR_AGO, HOUR_AGO))
    cache = opened(tmp_path / "cache", 3 * size + size // 2, shard)
    for extent in extents_of(shard)[::-1]:
        cache.put(extent, data_of(store, extent))
    held = [extent for extent in extents_of(shard) if held_by(cache, extent)]
    assert held == extents_of(shard)[:3]
    assert used(tmp_path / "cache") <= 3 * size + size // 2


def test_what_no_run_has_read_for_an_hour_makes_room_and_nothing_else(
    tmp_path: Path, store: FolderStore
) -> None:
    old, fresh, mine = (shard_of(store, number) for number in range(3))
    size = old.batches[0].bytes
    folder = tmp_path / "cache"
    both = opened(folder, 8 * size, old, fresh)
    fill(store, both, old)
    fill(store, both, fresh)
    for path in files(folder):
        if path.parent.name == old.sha256[:32]:
            os.utime(path, (HOUR_AGO, HOUR_AGO))
    assert held_by(both, Extent(old, 0, 1))  # and is used again by that
    cache = opened(folder, 8 * size, mine)
    fill(store, cache, mine)
    held = [[bool(held_by(cache, extent)) for extent in extents_of(shard)] for shard in (old, fresh, mine)]
    assert held == [[True, False, False, False], [True] * 4, [True] * 3 + [False]]
    assert used(folder) <= 8 * size


def test_temporary_files_of_killed_writers_go_and_those_of_living_ones_stay(
    tmp_path: Path, store: FolderStore
) -> None:
    folder = tmp_path / "cache" / "ab"
    folder.mkdir(parents=True)
    for name in (".writing-old", ".writing-new"):
        (folder / name).write_bytes(b"half")
    os.utime(folder / ".writing-old", (HOUR_AGO, HOUR_AGO))
    opened(tmp_path / "cache", 1 << 20)
    assert [path.name for path in files(tmp_path / "cache")] == [".writing-new"]


def test_a_folder_that_cannot_be_written_is_refused_and_a_disk_that_fails_later_is_not(
    tmp_path: Path, store: FolderStore, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cache-dir"):
        opened(tmp_path / "file", 1 << 20)
    shard = shard_of(store, 0)
    cache = opened(tmp_path / "cache", 1 << 20, shard)
    (tmp_path / "cache" / shard.sha256[:32]).write_bytes(b"")  # in the way
    fill(store, cache, shard)
    assert held_by(cache, Extent(shard, 0, 1)) is None


def _hammer(
    folder: Path, store: FolderStore, shards: list[Shard], limit: int, seed: int, wrong: object
) -> None:
    rng = np.random.default_rng(seed)
    cache = opened(folder, limit, *shards)
    while True:
        shard = shards[rng.integers(len(shards))]
        extent = extents_of(shard)[rng.integers(len(shard.batches))]
        data = held_by(cache, extent)
        if data is None:
            cache.put(extent, data_of(store, extent))
        elif data != data_of(store, extent):
            wrong.set()  # type: ignore[attr-defined]


def test_processes_that_share_a_folder_and_are_killed_leave_only_whole_entries_within_the_bound(
    tmp_path: Path, store: FolderStore
) -> None:
    shards = [shard_of(store, number, 16) for number in range(4)]
    size, folder = shards[0].batches[0].bytes, tmp_path / "cache"
    limit = 40 * size  # of 64 record batches
    context = multiprocessing.get_context("fork")
    wrong = context.Event()
    for round_number in range(3):
        workers = [
            context.Process(target=_hammer, args=(folder, store, shards, limit, 10 * round_number + n, wrong))
            for n in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            time.sleep(0.15)
            os.kill(worker.pid or 0, signal.SIGKILL)
        for worker in workers:
            worker.join()
        # Each process may have been killed within one write.
        assert used(folder) <= limit + 4 * size
    assert not wrong.is_set()
    for path in folder.glob("*/.writing-*"):
        os.utime(path, (HOUR_AGO, HOUR_AGO))
    cache = opened(folder, limit, *shards)  # what the dead held of the lock is free
    assert used(folder) <= limit
    found = [held_by(cache, extent) for shard in shards for extent in extents_of(shard)]
    assert sum(data is not None for data in found) >= 36
    assert int((folder / "bytes").read_text()) == used(folder)


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=40), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_whatever_is_put_and_removed_by_hand_the_bound_holds(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]], room: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    store = FolderStore(folder / "store")
    shard = shard_of(store, 0, 8)
    limit = room * shard.batches[0].bytes
    cache = opened(folder / "cache", limit, shard)
    for number, removed in steps:
        extent = Extent(shard, number, number + 1)
        if removed:
            for path in files(folder / "cache"):
                if path.name.startswith(f"{extent.offset}-"):
                    path.unlink()
        else:
            cache.put(extent, data_of(store, extent))
        assert used(folder / "cache") <= limit
        assert held_by(cache, extent) in (None, data_of(store, extent))
