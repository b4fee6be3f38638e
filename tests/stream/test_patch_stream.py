"""The stream: batches in the order of `order` from any store, and no thread left behind."""

from __future__ import annotations

import threading
import time
import tracemalloc
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from lungseg.config import StreamConfig
from lungseg.dataset.case import IGNORE
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.shards import Patch, write_shard
from lungseg.errors import ConfigError, DataError, LungsegError, StorageError
from lungseg.storage import FolderStore, Read, Store, open_store
from lungseg.stream.order import evaluation_batches, training_batches
from lungseg.stream.patch_stream import Batch, PatchStream

SHAPE = (2, 3, 4)
# Two shards of a split, with ragged last record batches: 11 patches.
SHARD_ROWS = ((3, 3, 1), (2, 2))
ROWS = [*SHARD_ROWS[0], *SHARD_ROWS[1]]
CONFIG = StreamConfig(threads=3)


def patch(number: int) -> Patch:
    """Patch number n is n throughout."""
    image, mask = np.full(SHAPE, number, np.int16), np.full(SHAPE, number % 2, np.uint8)
    return Patch(image, mask, "c", "", "lung", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def filled(store: Store, shape: tuple[int, int, int] = SHAPE) -> Manifest:
    """A data set whose patches are numbered through in the order that `order` counts them in."""
    numbers = iter(range(100))
    shards = tuple(
        write_shard(
            store,
            f"data/d/shards/train-{number:05d}.arrow",
            [[patch(next(numbers)) for _ in range(count)] for count in rows],
            shape,
            "lz4",
        )
        for number, rows in enumerate(SHARD_ROWS)
    )
    splits: dict[str, tuple] = {"train": shards, "val": shards, "empty": ()}
    return Manifest("d", "", {}, shape, splits, {}, {}, {}, ())


def numbers_of(batch: Batch) -> list[int]:
    """The patches of a batch by number; every voxel must be that number."""
    for image, mask in zip(batch.image_hu, batch.mask, strict=True):
        assert (image == image[0, 0, 0]).all()
        assert (mask == image[0, 0, 0] % 2).all() or (mask == IGNORE).all()
    return batch.image_hu[:, 0, 0, 0].tolist()


def expected(batches: object, count: int | None = None) -> list[list[int]]:
    first = np.cumsum([0, *ROWS])
    return [
        [int(first[s.record_batch]) + row for s in batch for row in range(s.start, s.stop)]
        for batch in islice(batches, count)  # type: ignore[call-overload]
    ]


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lungseg-stream")]


class SlowStore(FolderStore):
    """A folder that notes what is fetched and takes its time."""

    def __init__(self, root: Path, seconds: float = 0.0) -> None:
        super().__init__(root)
        self.seconds = seconds
        self.begun: list[tuple[str, int]] = []

    def get_into(self, key: str, start: int, out: memoryview, read: Read | None = None) -> None:
        self.begun.append((key, start))
        time.sleep(self.seconds)
        super().get_into(key, start, out, read)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_training_batches_are_those_of_the_order_at_every_world_size(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, world_size: int
) -> None:
    store = open_store(tmp_path if kind == "folder" else request.getfixturevalue("s3_uri"))
    manifest = filled(store)
    share = {"global_batch": 4, "seed": 5}
    together: list[list[int]] = [[] for _ in range(7)]
    for rank in range(world_size):
        mine = {**share, "rank": rank, "world_size": world_size}
        with PatchStream(store, manifest, "train", CONFIG, **mine) as stream:
            batches = list(islice(stream, 7))  # more than three passes
        assert [numbers_of(batch) for batch in batches] == expected(training_batches(ROWS, **mine), 7)
        assert [batch.step for batch in batches] == list(range(7))
        assert {batch.first_row for batch in batches} == {rank * 4 // world_size}
        assert {batch.image_hu.shape for batch in batches} == {(4 // world_size, *SHAPE)}
        for step, batch in enumerate(batches):
            together[step] += numbers_of(batch)
    assert together == expected(training_batches(ROWS, **share), 7)
    assert not our_threads()


@pytest.mark.parametrize("first_step", [1, 2, 9])
def test_a_resumed_stream_goes_on_where_the_other_stopped(tmp_path: Path, first_step: int) -> None:
    store = open_store(tmp_path)
    manifest = filled(store)
    with PatchStream(store, manifest, "train", CONFIG, global_batch=4) as stream:
        whole = list(islice(stream, first_step + 4))
    with PatchStream(store, manifest, "train", CONFIG, global_batch=4, first_step=first_step) as stream:
        rest = list(islice(stream, 4))
    assert [(b.step, numbers_of(b)) for b in rest] == [(b.step, numbers_of(b)) for b in whole[first_step:]]


def test_a_stream_that_was_left_by_break_goes_on_with_the_next_step(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with PatchStream(store, filled(store), "train", CONFIG, global_batch=4) as stream:
        (batch,) = islice(stream, 1)
        (after,) = islice(stream, 1)
    assert (batch.step, after.step) == (0, 1)
    assert [numbers_of(batch), numbers_of(after)] == expected(
        training_batches(ROWS, seed=0, global_batch=4), 2
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_gives_every_patch_once_and_fills_up_with_ignore(tmp_path: Path, world_size: int) -> None:
    store = open_store(tmp_path)
    manifest = filled(store)
    real, padding = [], 0
    for rank in range(world_size):
        share = {"global_batch": 4, "rank": rank, "world_size": world_size}
        with PatchStream(store, manifest, "val", CONFIG, training=False, **share) as stream:
            batches = list(stream)
        wanted = expected(evaluation_batches(ROWS, **share))
        assert len(batches) == 3
        for batch, numbers in zip(batches, wanted, strict=True):
            assert batch.mask.shape == (4 // world_size, *SHAPE)
            assert numbers_of(batch)[: len(numbers)] == numbers
            assert (batch.mask[: len(numbers)] <= 1).all()
            assert (batch.mask[len(numbers) :] == 255).all()
            real += numbers
            padding += len(batch.mask) - len(numbers)
    assert sorted(real) == list(range(11))
    assert padding == 1


def test_an_empty_split_has_no_batches_to_evaluate_and_is_refused_for_training(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with PatchStream(store, filled(store), "empty", CONFIG, global_batch=4, training=False) as stream:
        assert list(stream) == []
    with pytest.raises(DataError, match="too-few-patches"):
        PatchStream(store, filled(store), "empty", CONFIG, global_batch=4)


@pytest.mark.parametrize("training", [True, False])
def test_workers_that_do_not_divide_the_batch_are_refused(tmp_path: Path, training: bool) -> None:
    store = open_store(tmp_path)
    for world_size in (3, 8):
        share = {"global_batch": 4, "world_size": world_size}
        with pytest.raises(ConfigError, match="world-size"):
            PatchStream(store, filled(store), "train", CONFIG, training=training, **share)


@pytest.mark.alone
def test_an_exception_leaves_no_thread_and_waits_for_reads_under_way_only(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    manifest = filled(store)
    store.seconds = 0.3
    began = time.monotonic()

    def interrupted() -> None:
        with PatchStream(store, manifest, "train", StreamConfig(threads=2), global_batch=4) as stream:
            next(iter(stream))
            assert our_threads()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # Hundreds of batches were ahead, and their reads would take minutes; two rounds of reads for the first
    # batch and one under way may pass.
    assert time.monotonic() - began < 10
    assert len(store.begun) < 10
    assert not our_threads()


@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_an_error_of_a_fetching_thread_reaches_the_consumer(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    manifest = filled(store)
    second = manifest.shards["val"][1]
    data = bytearray(store.get(second.key))
    data[second.batches[1].offset + 40] ^= 1
    kind: type[LungsegError] = DataError if damage == "flip" else StorageError
    store.put(second.key, bytes(data)) if damage == "flip" else store.delete([second.key])
    given: list[int] = []

    def consume() -> None:
        with PatchStream(store, manifest, "val", CONFIG, global_batch=2, training=False) as stream:
            for batch in stream:
                given.extend(numbers_of(batch))

    with pytest.raises(kind, match="shard-corrupt" if damage == "flip" else "object-missing") as caught:
        consume()
    assert second.key in str(caught.value)
    # Everything before the damage was given: patches 0 to 8 lie before it, 7 and on where all is gone.
    assert given == list(range(8 if damage == "flip" else 6))
    assert not our_threads()


@pytest.mark.parametrize("world_size", [1, 2])
def test_prefetching_keeps_to_its_bound_and_fetches_no_extent_twice(tmp_path: Path, world_size: int) -> None:
    """160 patches of 384 KiB, of random HU, in extents of 4 record batches of 2; of two ranks each takes one
    patch of each record batch."""
    store = SlowStore(tmp_path)
    shape = (64, 64, 32)
    mask = np.zeros(shape, np.uint8)
    rng = np.random.default_rng(0)

    def patch_of_noise() -> Patch:
        hu = rng.integers(-1000, 400, shape, np.int16)
        return Patch(hu, mask, "c", "", "lung", (0, 0, 0), (1, 1, 1))

    shard = write_shard(store, "s", [[patch_of_noise(), patch_of_noise()] for _ in range(80)], shape, "raw")
    manifest = Manifest("d", "", {}, shape, {"train": (shard,)}, {}, {}, {}, (), batches_per_get=4)
    order = {"global_batch": 2, "world_size": world_size, "seed": 1}
    config = StreamConfig(prefetch_mib=16, threads=8)
    tracemalloc.start()  # of numpy and bytes; the decoded columns of codec raw are views of those
    try:
        with PatchStream(store, manifest, "train", config, **order) as stream:
            batches = iter(stream)
            for _ in range(60):
                next(batches)
                time.sleep(0.01)  # for the threads to go as far ahead as they may
            peak_mib = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    # The batch in hand and two record batches that are being decoded come on top.
    assert 8 < peak_mib < 16 + 3
    assert len(set(store.begun)) == len(store.begun)
    assert len(store.begun) >= 60 * 2 // world_size // 8


def test_tf_data_gets_whole_batches_of_static_shapes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = filled(store)
    order = {"global_batch": 4, "rank": 1, "world_size": 2, "seed": 2}
    with PatchStream(store, manifest, "train", CONFIG, **order) as stream:
        data = stream.dataset().prefetch(2)
        assert [spec.shape.as_list() for spec in data.element_spec] == [[], [], [2, *SHAPE], [2, *SHAPE]]
        elements = list(data.take(9).as_numpy_iterator())
    assert [int(step) for step, *_ in elements] == list(range(9))
    batches = [Batch(int(step), int(row), image, mask) for step, row, image, mask in elements]
    assert {batch.first_row for batch in batches} == {2}
    assert [numbers_of(batch) for batch in batches] == expected(training_batches(ROWS, **order), 9)
    assert not our_threads()


def test_tf_data_quotes_the_error_of_the_stream_and_ends_with_it(tmp_path: Path) -> None:
    import tensorflow as tf

    store = open_store(tmp_path)
    manifest = filled(store)
    shard = manifest.shards["val"][1]
    store.delete([shard.key])
    with PatchStream(store, manifest, "val", CONFIG, global_batch=2, training=False) as stream:
        data = iter(stream.dataset())
        with pytest.raises(tf.errors.OpError, match=f"object-missing.*{shard.key}"):
            list(data)
    assert not our_threads()


def test_a_stream_outside_its_with_block_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(RuntimeError, match="`with` block"):
        next(iter(PatchStream(store, filled(store), "train", CONFIG, global_batch=4)))


def test_two_streams_of_one_store_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = filled(store)
    with (
        PatchStream(store, manifest, "train", CONFIG, global_batch=4) as train,
        PatchStream(store, manifest, "val", CONFIG, global_batch=4, training=False) as val,
    ):
        pairs = list(zip(val, train, strict=False))
    assert list(chain.from_iterable(numbers_of(v) for v, _ in pairs))[:11] == list(range(11))
    assert [numbers_of(t) for _, t in pairs] == expected(training_batches(ROWS, seed=0, global_batch=4), 3)
