"""What is no CT in HU is told from what is, whole chests and crops of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.ct_slices import write
from pydicom.dataset import Dataset

from lungseg.scan.dicom import read_series
from lungseg.scan.plausible import not_hu


def chest(shape: tuple[int, int, int] = (24, 64, 64), noise_hu: float = 20) -> np.ndarray:
    """A body of soft tissue, fat and some bone with two lungs, in air, float [z, y, x]."""
    z, y, x = np.moveaxis(np.indices(shape) / np.reshape(shape, (3, 1, 1, 1)) - 0.5, 0, 0)
    hu = np.full(shape, -1000.0)
    hu[(x / 0.45) ** 2 + (y / 0.4) ** 2 < 1] = -90
    hu[(x / 0.4) ** 2 + (y / 0.35) ** 2 < 1] = 50
    hu[(x / 0.06) ** 2 + ((y - 0.25) / 0.06) ** 2 < 1] = 700
    for side in (-0.18, 0.18):
        hu[((x - side) / 0.13) ** 2 + (y / 0.22) ** 2 + (z / 0.6) ** 2 < 1] = -850
    return hu + np.random.default_rng(0).normal(0, noise_hu, shape)


WHOLE = chest()
CROP = WHOLE[:, 20:44, 8:24]  # lung and chest wall


@pytest.mark.parametrize("hu", [WHOLE, CROP], ids=["chest", "crop"])
@pytest.mark.parametrize(
    "still_hu",
    [
        lambda hu: hu,
        lambda hu: np.clip(hu, -1200, 400),
        lambda hu: np.clip(hu, -1024, 3071),
        lambda hu: np.where((hu > 0) & (hu < 100), hu + 350, hu),  # contrast agent
        lambda hu: np.where(np.indices(hu.shape)[1] < 4, -2000, hu),  # padding outside the field of view
    ],
    ids=["as read", "lung window", "12 bits", "contrast", "padded"],
)
def test_hu_of_chests_and_crops_are_plausible(hu, still_hu):
    assert not_hu(np.rint(still_hu(hu)).astype(np.int16)) == ""


@pytest.mark.parametrize("hu", [WHOLE, CROP], ids=["chest", "crop"])
@pytest.mark.parametrize(
    ("scaled", "why"),
    [
        (lambda hu: (np.clip(hu, -1000, 400) + 1000) / 1400, "the lowest is 0"),
        (lambda hu: (np.clip(hu, -1000, 400) + 1000) / 1400 * 255, "the lowest is "),
        (lambda hu: (hu - hu.mean()) / hu.std(), "the lowest is -"),
        (lambda hu: hu + 1024, "hardly a voxel is below -300 HU"),
    ],
    ids=["0..1", "0..255", "z-scores", "plus 1024"],
)
def test_other_scales_are_not(hu, scaled, why):
    assert why in not_hu(np.rint(scaled(hu)).astype(np.int16))


def test_padding_does_not_hide_that_1024_was_added():
    padded = np.where(np.indices(WHOLE.shape)[1] < 4, -2000, WHOLE + 1024)
    assert "perhaps HU + 1024" in not_hu(np.rint(padded).astype(np.int16))


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        (None, ""),
        ("HU", ""),
        ("US", ""),
        ("HU_MOD", ""),
        ("OD", "says OD"),
        ("Doe^Jane", "says another unit"),
    ],
)
def test_a_series_in_another_unit_is_named_by_its_tag(tmp_path, unit, said):
    def change(number: int, dataset: Dataset) -> Any:
        if unit is not None and number == 3:
            dataset.RescaleType = unit

    write(tmp_path, change)
    found = read_series(tmp_path).not_hu
    assert found == f"the tag RescaleType (0028,1054) {said}" if said else "RescaleType" not in found


def test_a_series_whose_values_are_no_hu_says_so(tmp_path):
    write(tmp_path, lambda number, dataset: setattr(dataset, "RescaleIntercept", 2000))
    assert "below -300 HU" in read_series(tmp_path).not_hu
