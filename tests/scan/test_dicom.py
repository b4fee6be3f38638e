"""DICOM series: a regular grid in HU at its patient coordinates, or an error that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from helpers.ct_slices import AXIAL, save, scan, slice_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from lungseg.scan.dicom import read_series

REAL = Path(__file__).parents[3] / "shared" / "data"


@given(st.permutations(range(6)), st.permutations(range(6)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_are_ordered_by_position_and_nothing_else(tmp_path_factory, names, numbers):
    folder, hu = tmp_path_factory.mktemp("series"), scan()
    for at, image in enumerate(hu):
        dataset = slice_of(image, (-110, 30, -100 + 2.5 * at), InstanceNumber=numbers[at])
        save(dataset, folder / f"{names[at]}.dcm")
    volume = read_series(folder)
    assert volume.volume_hu.dtype == np.int16
    assert np.array_equal(volume.volume_hu, hu)
    assert volume.geometry.shape_zyx == (6, 4, 5)
    assert volume.geometry.spacing_mm == pytest.approx((2.5, 0.75, 0.5))  # not SliceThickness, which says 7
    assert volume.geometry.origin_lps_mm == pytest.approx((-110, 30, -100))
    assert np.array(volume.geometry.direction_lps).tolist() == np.eye(3).tolist()


tilted = np.array([[np.cos(0.3), np.sin(0.3), 0], [-np.sin(0.3) * 0.8, np.cos(0.3) * 0.8, 0.6]])


@pytest.mark.parametrize(
    "orientation",
    [
        AXIAL,
        (-1, 0, 0, 0, -1, 0),
        (1, 0, 0, 0, -1, 0),
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        tilted.ravel(),
    ],
    ids=["supine", "prone", "feet-first-like", "sagittal", "coronal", "oblique"],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_marked_voxel_keeps_its_patient_coordinate(tmp_path, orientation, backwards):
    row, column = np.reshape(orientation, (2, 3)).astype(float)
    stack = np.cross(row, column) * (-1 if backwards else 1)
    hu = np.full((6, 4, 5), -1000, np.int16)
    hu[4, 1, 3] = 700
    for at, image in enumerate(hu):
        position = np.array([-110.0, 30.0, 55.0]) + 2.5 * at * stack
        save(slice_of(image, position, ImageOrientationPatient=list(orientation)), tmp_path / f"{at}.dcm")
    volume = read_series(tmp_path)
    # DICOM PS3.3 C.7.6.2.1.1: PixelSpacing is (between rows, between columns).
    expected = np.array([-110.0, 30.0, 55.0]) + 2.5 * 4 * stack + 3 * 0.5 * row + 1 * 0.75 * column
    found = np.argwhere(volume.volume_hu == 700)
    assert found.shape == (1, 3)
    assert volume.geometry.to_lps_mm(found[0]) == pytest.approx(expected, abs=1e-4)
    assert np.linalg.det(volume.geometry.direction_lps) == pytest.approx(1)


def test_each_slice_has_its_own_slope_and_intercept(tmp_path):
    def rescale(number: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = 1 + number, -500.6
        dataset.PixelData = np.full((4, 5), 10, np.int16).tobytes()

    write(tmp_path, rescale)
    means = read_series(tmp_path).volume_hu.mean(axis=(1, 2))
    assert means.tolist() == [-491, -481, -471, -461, -451, -441]


def test_hu_beyond_int16_are_clipped(tmp_path):
    def rescale(number: int, dataset: Dataset) -> None:
        dataset.RescaleSlope = 1000
        dataset.PixelData = np.array([-100, 100] * 10, np.int16).tobytes()

    write(tmp_path, rescale)
    assert np.unique(read_series(tmp_path).volume_hu).tolist() == [-32768, 32767]


@pytest.mark.parametrize(
    ("tags", "padded"),
    [
        ({"PixelPaddingValue": -2000}, [-2000]),
        ({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}, [-2000, -1995]),
    ],
)
def test_padding_becomes_air(tmp_path, tags, padded):
    def pad(number: int, dataset: Dataset) -> None:
        raw = np.array([*padded, 1024] + [-1989] * 17 + [5] * 2)[:20].astype(np.int16)
        dataset.PixelData = raw.tobytes()
        for tag, value in tags.items():
            dataset.add_new(tag, "SS", value)

    write(tmp_path, pad)
    first = read_series(tmp_path).volume_hu[0].ravel()
    assert first[: len(padded) + 2].tolist() == [-1024] * len(padded) + [0, -3013]


def test_padding_that_a_scanner_wrote_as_unsigned_is_understood(tmp_path):
    def pad(number: int, dataset: Dataset) -> None:
        dataset.PixelData = np.array([-2000] * 3 + [1024] * 17, np.int16).tobytes()
        dataset.add_new("PixelPaddingValue", "US", 65536 - 2000)

    write(tmp_path, pad)
    assert read_series(tmp_path).volume_hu[0].ravel()[:4].tolist() == [-1024, -1024, -1024, 0]


@pytest.mark.parametrize("name", ["ct64", "ct_c3n00247"])
def test_real_series_are_read_as_simpleitk_reads_them(name):
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"needs the real CT {name} in ../shared/data beside the checkout")
    volume = read_series(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    assert np.array_equal(volume.volume_hu, np.clip(sitk.GetArrayFromImage(image), -32768, 32767))
    assert volume.geometry.spacing_mm == pytest.approx(image.GetSpacing()[::-1], abs=1e-3)
    assert volume.geometry.origin_lps_mm == pytest.approx(image.GetOrigin(), abs=1e-3)
    last = np.array(volume.geometry.shape_zyx) - 1
    expected = image.TransformIndexToPhysicalPoint(last[::-1].tolist())
    assert volume.geometry.to_lps_mm(last) == pytest.approx(expected, abs=0.01)
