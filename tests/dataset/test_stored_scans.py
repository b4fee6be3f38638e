"""Whole scans in the store: what is read is what was written, or an error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lungseg.dataset.case import Nodule, Outlines, Truth
from lungseg.dataset.stored_scans import StoredScan, read_scan, read_truth, write_scan
from lungseg.errors import DataError
from lungseg.scan.volume import Geometry, Volume
from lungseg.storage import open_store

KEY = "data/d/volumes/val/c.arrow"
TILTED = ((0.6, 0.8, 0.0), (-0.8, 0.6, 0.0), (0.0, 0.0, 1.0))


def scan(shape: tuple[int, int, int] = (5, 6, 7)) -> StoredScan:
    rng = np.random.default_rng(1)
    hu = rng.integers(-1024, 3072, shape, dtype=np.int16)
    numbers = rng.choice(np.array([0, 1, 2, 300, -1, -7], np.int16), shape)
    grid = Geometry(shape, (2.5, 0.1, 1 / 3), (-150.25, 1e-7, 300.0), TILTED)
    return StoredScan(Volume(hu, grid), numbers, truth())


def truth() -> Truth:
    """On a grid of its own: two nodules that touch, one of them outlined by three readers, and a region."""
    numbers = np.zeros((4, 9, 8), np.int16)
    numbers[1:3, 2:5, 3:5], numbers[1:3, 2:5, 5:7], numbers[3, 8, 0] = 1, 2, -1
    nodules = (
        Nodule("n01", (1.5, 2.0, 3.25), 5.0, 3, 0.75, 5.5, 4.5, 3.0, 6),
        Nodule("n03", (2.5, 2.0, 3.25), 5.0, 0),
    )
    masks = np.random.default_rng(2).random((3, 2, 3, 3)) < 0.5
    outlines = {1: Outlines((1, 2, 3), masks), -1: Outlines((3, 8, 0), np.ones((1, 1, 1, 1), bool))}
    region = Nodule("n02", (0.0, 0.0, 9.0), 1.0, 1)
    grid = Geometry((4, 9, 8), (1.25, 0.7, 0.7), (-10.0, 3.0, 0.0), TILTED)
    return Truth(grid, numbers, nodules, (region,), outlines)


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 7), (1, 1, 1)])
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_voxels_and_geometry_come_back_exactly(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, shape: tuple[int, int, int]
) -> None:
    store = open_store(tmp_path if kind == "folder" else request.getfixturevalue("s3_uri"))
    written = scan(shape)
    entry = write_scan(store, KEY, "c", written)
    read = read_scan(store, entry)
    assert (entry.case_id, entry.key, entry.bytes) == ("c", KEY, store.size(KEY))
    assert entry.sha256 == hashlib.sha256(store.get(KEY)).hexdigest()
    assert read.volume.geometry == written.volume.geometry
    assert (read.volume.volume_hu.dtype, read.numbers.dtype) == (np.int16, np.int16)
    np.testing.assert_array_equal(read.volume.volume_hu, written.volume.volume_hu)
    np.testing.assert_array_equal(read.numbers, written.numbers)


@pytest.mark.parametrize("read", [lambda store, entry: read_scan(store, entry).truth, read_truth])
def test_the_truth_comes_back_on_its_own_grid_with_every_readers_outline(
    tmp_path: Path, read: Callable[..., Truth]
) -> None:
    store = open_store(tmp_path)
    found, wanted = read(store, write_scan(store, KEY, "c", scan())), truth()
    assert (found.geometry, found.nodules, found.regions) == (wanted.geometry, wanted.nodules, wanted.regions)
    assert found.numbers.dtype == np.int16
    np.testing.assert_array_equal(found.numbers, wanted.numbers)
    assert list(found.outlines) == [1, -1]
    for number, one in wanted.outlines.items():
        assert found.outlines[number].first_zyx == one.first_zyx
        np.testing.assert_array_equal(found.outlines[number].masks, one.masks)


def test_a_scan_in_which_nobody_marked_anything_has_an_empty_truth(tmp_path: Path) -> None:
    store, grid = open_store(tmp_path), truth().geometry
    empty = Truth(grid, np.zeros(grid.shape_zyx, np.int16), ())
    found = read_truth(store, write_scan(store, KEY, "c", replace(scan(), truth=empty)))
    assert (found.nodules, found.regions, found.outlines) == ((), (), {})
    assert found.numbers.shape == (4, 9, 8)
    assert not found.numbers.any()


def test_the_mask_says_nodule_ignore_or_neither() -> None:
    numbers = np.array([[[0, 1, 2, 300, -1, -7]]], np.int16)
    found = StoredScan(
        Volume(numbers, Geometry((1, 1, 6), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), TILTED)), numbers, truth()
    )
    assert found.mask.tolist() == [[[0, 1, 1, 1, 255, 255]]]
    assert found.mask.dtype == np.uint8


def test_the_same_scan_gives_the_same_bytes_and_plain_arrow_reads_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert write_scan(store, KEY, "c", scan()) == write_scan(store, KEY, "c", scan())
    with pa.ipc.open_file(tmp_path / KEY) as reader:
        (image,) = reader.get_batch(0)["image"].to_numpy_ndarray()
        geometry = json.loads(reader.schema.metadata[b"geometry"])
    np.testing.assert_array_equal(image, scan().volume.volume_hu)
    assert geometry["spacing_mm"] == [2.5, 0.1, 1 / 3]


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_changed_bytes_are_an_error_that_names_the_object(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    entry = write_scan(store, KEY, "c", scan())
    data = bytearray(store.get(KEY))
    data[len(data) // 2] ^= 1
    store.put(KEY, bytes(data) if damage == "flip" else bytes(data[:-1]))
    with pytest.raises(DataError, match="scan-corrupt") as caught:
        read_scan(store, entry)
    assert caught.value.where == {"key": KEY}
