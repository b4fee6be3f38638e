"""Series that are no regular grid are refused, by name and with a remedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pydicom
import pytest
from helpers.ct_slices import refused, save, slice_of, write
from pydicom.dataset import Dataset

from lungseg.errors import DataError
from lungseg.scan.dicom import read_series


def test_a_missing_slice_is_refused_with_its_neighbours(tmp_path):
    write(tmp_path)
    (tmp_path / "3.dcm").unlink()
    error = refused(tmp_path)
    assert error.code == "slices-missing"
    assert error.where == {"between": "2.dcm and 4.dcm", "missing": 1}


def test_the_same_file_twice_is_read_once_and_a_conflicting_one_is_refused(tmp_path):
    hu = write(tmp_path)
    copy = pydicom.dcmread(tmp_path / "3.dcm")
    copy.save_as(tmp_path / "copy.dcm")
    assert np.array_equal(read_series(tmp_path).volume_hu, hu)
    copy.PixelData = copy.PixelData[:-2] + b"\x00\x00"
    copy.save_as(tmp_path / "copy.dcm")
    error = refused(tmp_path)
    assert error.code == "slices-duplicate"
    assert error.where["files"] == "3.dcm and copy.dcm"


def test_a_series_that_is_there_twice_is_refused(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert refused(tmp_path).code == "slices-duplicate"


def move(at: int, by: tuple[float, float, float]) -> Callable[[int, Dataset], None]:
    def change(number: int, dataset: Dataset) -> None:
        if number == at:
            dataset.ImagePositionPatient = [
                a + b for a, b in zip(dataset.ImagePositionPatient, by, strict=True)
            ]

    return change


def test_uneven_slices_are_refused_and_rounded_positions_are_not(tmp_path):
    write(tmp_path / "uneven", move(3, (0, 0, 0.6)))
    error = refused(tmp_path / "uneven")
    assert error.code == "slices-irregular"
    assert error.where == {"file": "3.dcm", "off_by_mm": 0.6}
    write(tmp_path / "rounded", move(3, (0, 0, 0.1)))
    assert read_series(tmp_path / "rounded").geometry.spacing_mm[0] == pytest.approx(2.5)


def test_gantry_tilt_is_refused(tmp_path):
    def shear(number: int, dataset: Dataset) -> None:
        move(number, (0, 0.2 * number, 0))(number, dataset)

    write(tmp_path, shear)
    assert refused(tmp_path).code == "gantry-tilt"


@pytest.mark.parametrize(
    ("tag", "value", "code"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 0, 0, -1], "slices-mixed"),
        ("PixelSpacing", [0.75, 0.6], "slices-mixed"),
        ("ImagePositionPatient", None, "geometry-missing"),
        ("PixelSpacing", None, "geometry-missing"),
    ],
)
def test_one_slice_of_another_geometry_is_refused_by_name(tmp_path, tag, value, code):
    def change(number: int, dataset: Dataset) -> None:
        if number == 2:
            setattr(dataset, tag, value)

    write(tmp_path, change)
    error = refused(tmp_path)
    assert error.code == code
    assert error.where["file"] == "2.dcm"


def test_slices_of_two_sizes_are_refused(tmp_path):
    write(tmp_path)
    save(slice_of(np.zeros((4, 6), np.int16), (-110, 30, -85)), tmp_path / "large.dcm")
    error = refused(tmp_path)
    assert (error.code, error.where["file"]) == ("slices-mixed", "large.dcm")


def test_axes_that_are_not_at_right_angles_are_refused(tmp_path):
    write(tmp_path, lambda number, dataset: setattr(dataset, "ImageOrientationPatient", [1, 0, 0, 0.1, 1, 0]))
    assert refused(tmp_path).code == "orientation-invalid"


def test_a_single_slice_has_no_distance(tmp_path):
    save(slice_of(np.zeros((4, 5), np.int16)), tmp_path / "0.dcm")
    assert refused(tmp_path).code == "slices-too-few"


def test_hu_are_not_guessed(tmp_path):
    write(tmp_path, lambda number, dataset: dataset.__delattr__("RescaleSlope"))
    assert refused(tmp_path, DataError).code == "rescale-missing"


@pytest.mark.parametrize("spacing", [[7e-4, 7e-4], [700, 700]])
def test_pixels_in_metres_or_microns_are_refused(tmp_path, spacing):
    write(tmp_path, lambda number, dataset: setattr(dataset, "PixelSpacing", spacing))
    assert refused(tmp_path).code == "spacing-implausible"
