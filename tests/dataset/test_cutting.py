"""One scan of a data set: its grid, its patches, and what is kept of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from helpers.painted import AXIAL, contents, labelled, write_pairs

from lungseg.config import DataConfig, PatchConfig
from lungseg.dataset.case import IGNORE, LabelledScan, Nodule
from lungseg.dataset.cutting import cut_patches, prepare_scan, to_grid
from lungseg.scan.volume import Geometry, Volume
from lungseg.storage import open_store

SMALL = PatchConfig(shape_zyx=(16, 16, 16))


@pytest.mark.parametrize("spacing_mm", [(2.5, 0.7, 0.7), (1.25, 0.6, 0.6), (1.0, 1.0, 1.0), (0.5, 0.9, 1.3)])
def test_resampling_keeps_the_volume_of_a_ball(spacing_mm: tuple[float, float, float]) -> None:
    shape = tuple(math.ceil(40 / step) for step in spacing_mm)
    scan = labelled(shape, spacing_mm)  # type: ignore[arg-type]
    stored = to_grid(scan, (1.0, 1.0, 1.0))
    drawn_mm3 = scan.mask.sum() * math.prod(spacing_mm)
    assert (stored.mask == 1).sum() == pytest.approx(drawn_mm3, rel=0.03)
    index = stored.volume.geometry.to_lps_mm(np.argwhere(stored.mask == 1).mean(axis=0))
    assert index == pytest.approx(scan.nodules[0].centre_lps_mm, abs=0.15)


def test_ignore_regions_are_255_and_never_on_a_nodule() -> None:
    scan = labelled((20, 40, 40), (2.0, 1.0, 1.0))
    stored = to_grid(scan, (2.0, 1.0, 1.0))
    np.testing.assert_array_equal(stored.mask == 1, scan.mask == 1)
    np.testing.assert_array_equal(stored.mask == 255, scan.ignore == 1)
    found = cut_patches("c", scan, stored, PatchConfig(shape_zyx=(16, 16, 16)))
    assert {patch.stratum for patch in found if (patch.mask != 0).any()} == {"nodule"}
    assert any((patch.mask == IGNORE).any() for patch in found)


def test_nodules_that_touch_stay_two_and_each_voxel_is_its_nearest_nodules() -> None:
    """Two cubes of 6 mm side by side, and an ignored one beside the second; from 2 mm slices to 1 mm."""
    grid = Geometry((10, 20, 30), (2.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL)
    numbers = np.zeros(grid.shape_zyx, np.int16)
    for first, number in ((6, 1), (12, 2), (18, -1)):
        numbers[3:6, 6:12, first : first + 6] = number
    two = (Nodule("a", (8.5, 8.5, 8.0), 6.0, 4), Nodule("b", (14.5, 8.5, 8.0), 6.0, 4))
    hu = np.full(grid.shape_zyx, -800, np.int16)
    stored = to_grid(LabelledScan(Volume(hu, grid), numbers, two), (1.0, 1.0, 1.0))
    assert {int(n): int((stored.numbers == n).sum()) for n in (1, 2, -1)} == {1: 216, 2: 216, -1: 216}
    at = {n: stored.volume.geometry.to_lps_mm(np.argwhere(stored.numbers == n).mean(axis=0)) for n in (1, 2)}
    assert at[1] == pytest.approx((8.5, 8.5, 8.0))
    assert at[2] == pytest.approx((14.5, 8.5, 8.0))


def test_a_crop_smaller_than_a_patch_is_filled_with_air() -> None:
    scan = labelled((9, 20, 15), (1.0, 1.0, 1.0))
    stored = to_grid(scan, (1.0, 1.0, 1.0))
    found = cut_patches("c", scan, stored, PatchConfig(shape_zyx=(32, 32, 32), jitter=0.0))
    assert [patch.stratum for patch in found] == ["nodule"] * 4
    for patch in found:
        assert patch.image_hu.shape == patch.mask.shape == (32, 32, 32)
        assert (patch.image_hu == -1024).sum() == 32**3 - 9 * 20 * 15
        assert (patch.mask == 1).sum() == scan.mask.sum()
        assert patch.centre_lps_mm == pytest.approx(scan.nodules[0].centre_lps_mm, abs=0.51)


def test_jobs_of_other_settings_under_one_name_write_other_objects(
    tmp_path: Path,
) -> None:
    """What the second writes leaves the bytes of the first as they were."""
    (case,) = write_pairs(tmp_path / "pairs", 1)
    store = open_store(tmp_path / "store")
    config = DataConfig(patch=SMALL)
    coarser = DataConfig(patch=SMALL, spacing_mm=(1.0, 1.0, 1.1))
    ours, before = prepare_scan(store, "d", case, "val", config), contents(store)
    theirs = prepare_scan(store, "d", case, "val", coarser)
    assert {key: store.get(key) for key in before} == before
    objects = [ours.cut.shard, theirs.cut.shard, ours.held_out, theirs.held_out]
    assert len({one.key for one in objects if one}) == 4


def test_a_volume_is_copied_from_another_data_set_unless_it_is_damaged(tmp_path: Path) -> None:
    (case,) = write_pairs(tmp_path / "pairs", 1)
    store, config = open_store(tmp_path / "store"), DataConfig(patch=SMALL)
    first = prepare_scan(store, "first", case, "val", config).held_out
    assert first is not None
    whole = store.get(first.key)
    copied = prepare_scan(store, "second", case, "test", config).held_out
    assert copied is not None
    assert (copied.sha256, store.get(copied.key)) == (first.sha256, whole)
    store.put(first.key, whole[:-1])
    third = prepare_scan(store, "third", case, "val", config).held_out
    assert third is not None
    assert store.get(third.key) == whole


def test_the_choice_of_patches_is_the_same_for_ever() -> None:
    """By the settings' seed and the case id alone: a new format of storage does not draw them anew."""
    scan = labelled((40, 40, 40), (1.0, 1.0, 1.0))
    found = cut_patches("c", scan, to_grid(scan, (1.0, 1.0, 1.0)), SMALL)
    centres = [patch.centre_lps_mm for patch in found if patch.stratum == "nodule"]
    assert centres == [
        (-12.0, 30.5, -377.0),
        (-13.0, 36.5, -383.0),
        (-8.0, 28.5, -383.0),
        (-8.0, 34.5, -382.0),
    ]
