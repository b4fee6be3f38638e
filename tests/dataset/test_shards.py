"""Shards: plain Arrow to others, and for us record batches of which no flipped bit goes unseen."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import Codec
from lungseg.dataset.case import IGNORE
from lungseg.dataset.shards import (
    Extent,
    Patch,
    copy_rows,
    decode,
    encode,
    fetch,
    patches_of,
    write_shard,
)
from lungseg.errors import DataError, StorageError
from lungseg.storage import FolderStore, open_store

SHAPE = (3, 4, 5)
KEY = "data/d/shards/train-00000.arrow"
CODECS: list[Codec] = ["raw", "lz4", "zstd", "planes-lz4", "planes-zstd"]


def patch(number: int) -> Patch:
    rng = np.random.default_rng(number)
    return Patch(
        image_hu=rng.integers(-1024, 3072, SHAPE, dtype=np.int16),
        mask=rng.choice(np.array([0, 1, IGNORE], np.uint8), SHAPE),
        case_id=f"Fall-{number} ä",
        nodule_id=str(number) if number % 2 else "",
        stratum="nodule" if number % 2 else "lung",
        centre_lps_mm=(number + 0.1, -number / 3, 1e-9),
        spacing_mm=(2.5, 0.7, 0.7),
    )


def groups() -> list[list[Patch]]:
    """Record batches of 3, 3 and 1 patches."""
    return [[patch(number) for number in numbers] for numbers in (range(3), range(3, 6), range(6, 7))]


def assert_same(one: Patch, other: Patch) -> None:
    for field in dataclasses.fields(Patch):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert ours == theirs


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit, from its definition in RFC 3720 (reflected polynomial 82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


class CountedStore(FolderStore):
    """A folder whose first `bad_reads` reads come with a flipped bit, as from a bad network card."""

    def __init__(self, root: Path, bad_reads: int = 0) -> None:
        super().__init__(root)
        self.gets: list[tuple[str, int, int | None]] = []
        self.renewals = 0
        self.bad_reads = bad_reads

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        self.gets.append((key, start, length))
        data = bytearray(super().get(key, start, length))
        data[len(data) // 2] ^= 4 * (len(self.gets) <= self.bad_reads)
        return bytes(data)

    def renew(self) -> None:
        self.renewals += 1


@pytest.mark.parametrize("codec", CODECS)
def test_every_patch_comes_back_exactly_also_of_a_ragged_last_batch(tmp_path: Path, codec: Codec) -> None:
    store = open_store(tmp_path)
    shard = write_shard(store, KEY, groups(), SHAPE, codec)
    assert [batch.rows for batch in shard.batches] == [3, 3, 1]
    assert [batch.positives for batch in shard.batches] == [1, 2, 0]
    for number, group in enumerate(groups()):
        data = fetch(store, Extent(shard, number, number + 1))
        rows = slice(len(group) // 2, len(group))
        shape = (rows.stop - rows.start, *SHAPE)
        image, mask = np.full(shape, 7, np.int16), np.full(shape, 7, np.uint8)
        copy_rows(decode(data, SHAPE, codec), rows.start, rows.stop, image, mask)
        np.testing.assert_array_equal(image, [one.image_hu for one in group[rows]])
        np.testing.assert_array_equal(mask, [one.mask for one in group[rows]])
        for read, written in zip(patches_of(data, SHAPE, codec), group, strict=True):
            assert_same(read, written)


@given(st.sampled_from(CODECS), st.data())
@settings(deadline=None)
def test_every_int16_survives_every_codec(codec: Codec, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=60, max_size=60))
    hu = np.array(values, np.int16).reshape(SHAPE)
    written = dataclasses.replace(patch(0), image_hu=hu)
    file, (batch,) = encode([[written]], SHAPE, codec)
    (read,) = patches_of(file[batch.offset : batch.offset + batch.bytes], SHAPE, codec)
    assert_same(read, written)


def test_masks_are_compressed_by_every_codec_and_noisy_images_by_planes_only(tmp_path: Path) -> None:
    shape = (32, 32, 32)
    voxels = 32**3
    noise = np.random.default_rng(0).normal(-700, 60, shape).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[8:20, 8:20, 8:20] = 1
    one = dataclasses.replace(patch(0), image_hu=noise, mask=mask)
    size = {codec: len(encode([[one]], shape, codec)[0]) / voxels for codec in CODECS}
    assert 2.0 < size["raw"] < 2.2  # of 3 bytes a voxel; 2 of them are the image
    assert size["lz4"] > 1.9  # it finds nothing in the low bytes, which the high ones interrupt
    assert max(size["planes-lz4"], size["planes-zstd"]) < 1.3


@pytest.mark.parametrize("codec", ["raw", "planes-lz4", "planes-zstd"])
def test_frames_of_format_4_are_read(codec: Codec) -> None:
    """Low and high bytes of each patch, compressed by Arrow; else runs on such data sets were lost."""
    one = dataclasses.replace(patch(1), image_hu=np.linspace(-1024, 3071, 60).astype(np.int16).reshape(SHAPE))
    file, (batch,) = encode([[one]], SHAPE, codec)
    columns = decode(file[batch.offset : batch.offset + batch.bytes], SHAPE, codec)
    for name, planes in (
        ("image", [one.image_hu.astype(np.uint8), (one.image_hu >> 8).astype(np.uint8)]),
        ("mask", [one.mask]),
    ):
        if pa.types.is_binary(columns[name].type):
            frame = pa.compress(np.stack(planes), "zstd" if codec == "planes-zstd" else "lz4", asbytes=True)
            columns = columns.set_column(columns.schema.get_field_index(name), name, pa.array([frame]))
    image, mask = np.full((1, *SHAPE), 7, np.int16), np.full((1, *SHAPE), 7, np.uint8)
    copy_rows(columns, 0, 1, image, mask)
    np.testing.assert_array_equal(image[0], one.image_hu)
    np.testing.assert_array_equal(mask[0], one.mask)


def test_a_frame_writes_no_further_than_the_memory_that_it_is_for() -> None:
    """A manifest that says a smaller shape would have others' memory written over."""
    file, (batch,) = encode([[patch(0)]], SHAPE, "planes-lz4")
    columns = decode(file[batch.offset : batch.offset + batch.bytes], SHAPE, "planes-lz4")
    roomy = np.full((2, *SHAPE), 7, np.int16)
    mask = np.empty((1, *SHAPE), np.uint8)
    for image in (roomy[:1, :2], roomy[:1, :, :2], np.empty((1, 2, *SHAPE[1:]), np.int16)):
        with pytest.raises(ValueError, match="contiguous"):
            copy_rows(columns, 0, 1, image, mask)
    assert (roomy == 7).all()


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_patches_give_the_same_bytes(tmp_path: Path, codec: Codec) -> None:
    store = open_store(tmp_path)
    shard = write_shard(store, "a", groups(), SHAPE, codec)
    again = write_shard(store, "b", iter(groups()), SHAPE, codec)
    assert store.get("a") == store.get("b")
    assert shard == dataclasses.replace(again, key="a")
    assert (shard.bytes, shard.sha256) == (store.size("a"), hashlib.sha256(store.get("a")).hexdigest())


@pytest.mark.parametrize("codec", CODECS)
def test_plain_arrow_reads_the_file_and_finds_the_batches_where_the_entry_says(
    tmp_path: Path, codec: Codec
) -> None:
    shard = write_shard(open_store(tmp_path), KEY, groups(), SHAPE, codec)
    data = (tmp_path / KEY).read_bytes()
    with pa.ipc.open_file(tmp_path / KEY) as reader:
        assert reader.num_record_batches == 3
        for number, batch in enumerate(shard.batches):
            span = data[batch.offset : batch.offset + batch.bytes]
            assert crc32c(span) == batch.crc32c
            alone = pa.ipc.read_record_batch(pa.ipc.read_message(span), reader.schema)
            assert alone.equals(reader.get_batch(number))
            assert alone["case_id"].to_pylist() == [one.case_id for one in groups()[number]]
            if codec in ("lz4", "zstd"):
                mask = alone["mask"].to_numpy_ndarray()
                np.testing.assert_array_equal(mask, [one.mask for one in groups()[number]])
            if not codec.startswith("planes"):
                image = alone["image"].to_numpy_ndarray()
                np.testing.assert_array_equal(image, [one.image_hu for one in groups()[number]])


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_at_any_place_of_a_record_batch_is_seen(tmp_path: Path, codec: Codec) -> None:
    store = open_store(tmp_path)
    shard = write_shard(store, KEY, groups(), SHAPE, codec)
    batch = shard.batches[1]
    with (tmp_path / KEY).open("r+b", buffering=0) as file:
        for at in range(batch.offset, batch.offset + batch.bytes):
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))
            with pytest.raises(DataError, match="shard-corrupt"):
                fetch(store, Extent(shard, 1, 2), refetches=0)
            file.seek(at)
            file.write(bytes([byte]))
    assert len(patches_of(fetch(store, Extent(shard, 1, 2), refetches=0), SHAPE, codec)) == 3


def test_one_good_batch_costs_one_ranged_get(tmp_path: Path) -> None:
    store = CountedStore(tmp_path)
    shard = write_shard(store, KEY, groups(), SHAPE, "lz4")
    fetch(store, Extent(shard, 1, 2))
    assert store.gets == [(KEY, shard.batches[1].offset, shard.batches[1].bytes)]
    assert store.renewals == 0


@pytest.mark.parametrize("bad_reads", [1, 3])
def test_a_passing_fault_is_healed_by_fetching_again_on_a_new_connection(
    tmp_path: Path, bad_reads: int
) -> None:
    store = CountedStore(tmp_path, bad_reads)
    shard = write_shard(store, KEY, groups(), SHAPE, "raw")
    data = fetch(store, Extent(shard, 0, 1), refetches=3)
    assert_same(patches_of(data, SHAPE, "raw")[2], patch(2))
    assert (len(store.gets), store.renewals) == (bad_reads + 1, bad_reads)


def test_an_extent_of_several_record_batches_is_one_get_and_names_the_one_that_is_damaged(
    tmp_path: Path,
) -> None:
    store = CountedStore(tmp_path)
    shard = write_shard(store, KEY, groups(), SHAPE, "planes-lz4")
    extent = Extent(shard, 0, 3)
    data = fetch(store, extent)
    assert store.gets == [(KEY, shard.batches[0].offset, sum(batch.bytes for batch in shard.batches))]
    for batch, group in zip(shard.batches, groups(), strict=True):
        for read, written in zip(
            patches_of(extent.part(data, batch), SHAPE, "planes-lz4"), group, strict=True
        ):
            assert_same(read, written)
    broken = bytearray((tmp_path / KEY).read_bytes())
    broken[shard.batches[1].offset + 60] ^= 1
    (tmp_path / KEY).write_bytes(bytes(broken))
    with pytest.raises(DataError, match="shard-corrupt") as caught:
        fetch(store, extent, refetches=1)
    assert caught.value.where["offset"] == shard.batches[1].offset
    assert extent.damage(data[:-1]) == shard.batches[0]


@pytest.mark.parametrize("refetches", [0, 2])
def test_a_lasting_fault_ends_in_an_error_with_shard_and_offset(tmp_path: Path, refetches: int) -> None:
    store = CountedStore(tmp_path, bad_reads=99)
    shard = write_shard(store, KEY, groups(), SHAPE, "raw")
    with pytest.raises(DataError, match="shard-corrupt") as caught:
        fetch(store, Extent(shard, 2, 3), refetches)
    batch = shard.batches[2]
    assert caught.value.where == {"shard": KEY, "offset": batch.offset, "bytes": batch.bytes}
    assert len(store.gets) == refetches + 1


def test_a_shard_cut_short_or_gone_is_an_error_of_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    shard = write_shard(store, KEY, groups(), SHAPE, "raw")
    store.put(KEY, store.get(KEY)[: shard.batches[2].offset + 8])
    with pytest.raises(StorageError, match="object-truncated"):
        fetch(store, Extent(shard, 2, 3))
    store.delete([KEY])
    with pytest.raises(StorageError, match="object-missing"):
        fetch(store, Extent(shard, 0, 1))
