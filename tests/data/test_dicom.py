"""DICOM series: a regular grid in HU at its patient coordinates, or an error that names the file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    generate_uid,
)

from lungseg.data.dicom import find_series, read_series
from lungseg.errors import DataError, GeometryError, LungsegError

REAL = Path(__file__).parents[3] / "shared" / "data"
AXIAL = (1, 0, 0, 0, 1, 0)
SERIES, OTHER = generate_uid(), generate_uid()
SECRETS = ("Doe^Jane", "MRN-4711", SERIES, OTHER)


def slice_of(hu: np.ndarray, position=(0.0, 0.0, 0.0), series=SERIES, **tags) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.PatientName, dataset.PatientID, dataset.Modality = "Doe^Jane", "MRN-4711", "CT"
    dataset.SeriesInstanceUID, dataset.ImageType = series, ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient = [round(float(value), 6) for value in position]
    dataset.ImageOrientationPatient, dataset.PixelSpacing, dataset.SliceThickness = (
        list(AXIAL),
        [0.75, 0.5],
        7.0,
    )
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *hu.shape[-2:], 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = (hu + 1024).astype(np.int16).tobytes()
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    return dataset


def save(dataset: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def scan() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1500, (6, 4, 5)).astype(np.int16)


def write(folder: Path, change: Callable[[int, Dataset], None] | None = None, step=2.5) -> np.ndarray:
    """Six axial slices at z = -100, -97.5, …; `change` may edit each data set."""
    hu = scan()
    for number, image in enumerate(hu):
        dataset = slice_of(image, (-110.0, 30.0, -100.0 + step * number))
        if change:
            change(number, dataset)
        save(dataset, folder / f"{number}.dcm")
    return hu


def refused(folder: Path, error: type[LungsegError] = GeometryError) -> LungsegError:
    with pytest.raises(error) as caught:
        read_series(folder)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert caught.value.remedy
    return caught.value


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


def test_several_series_are_listed_by_number_and_one_can_be_chosen(tmp_path):
    hu = write(tmp_path / "first")
    write(tmp_path / "second", lambda number, dataset: setattr(dataset, "SeriesInstanceUID", OTHER))
    (tmp_path / "second" / "5.dcm").unlink()
    error = refused(tmp_path, DataError)
    assert error.code == "series-ambiguous"
    assert error.message == "1: 6 slices, first first/0.dcm; 2: 5 slices, first second/0.dcm"
    found = find_series(tmp_path)
    assert {uid: len(files) for uid, files in found.items()} == {SERIES: 6, OTHER: 5}
    assert np.array_equal(read_series(tmp_path, SERIES).volume_hu, hu)
    assert read_series(tmp_path, OTHER).volume_hu.shape == (5, 4, 5)
    with pytest.raises(DataError) as caught:
        read_series(tmp_path, "1.2.3")
    assert caught.value.code == "series-missing"
    assert "1.2.3" not in str(caught.value)


def test_uids_in_the_names_of_folders_and_files_are_shortened(tmp_path):
    folder = tmp_path / OTHER
    write(folder / SERIES)
    last = folder / SERIES / f"{OTHER}.dcm"
    (folder / SERIES / "5.dcm").rename(last)
    last.write_bytes(last.read_bytes()[:-9])
    assert refused(folder, DataError).where["file"] == f"…{SERIES[-6:]}/…{OTHER[-6:]}.dcm"
    assert refused(folder / "absent", DataError).where["folder"].endswith(f"…{OTHER[-6:]}/absent")
    write(folder / "again", lambda number, dataset: setattr(dataset, "SeriesInstanceUID", OTHER))
    assert refused(folder, DataError).code == "series-ambiguous"


def test_what_is_no_ct_slice_is_left_out(tmp_path):
    hu = write(tmp_path)
    (tmp_path / "notes.txt").write_text("not DICOM")
    (tmp_path / "annotations.xml").write_text("<xml/>" * 100)
    (tmp_path / "._0.dcm").write_bytes(b"resource fork")
    save(slice_of(hu[0], Modality="", SOPClassUID=MediaStorageDirectoryStorage), tmp_path / "DICOMDIR")
    save(slice_of(hu[0], Modality="PR"), tmp_path / "presentation.dcm")
    save(slice_of(hu[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), tmp_path / "scout.dcm")
    assert np.array_equal(read_series(tmp_path).volume_hu, hu)


def test_no_series_at_all(tmp_path):
    assert refused(tmp_path / "absent", DataError).code == "folder-missing"
    assert refused(tmp_path, DataError).code == "series-none"
    (tmp_path / "notes.txt").write_text("not DICOM")
    assert refused(tmp_path, DataError).code == "series-none"


@pytest.mark.parametrize(
    ("kept", "code"), [(0, "dicom-unreadable"), (100, "dicom-unreadable"), (-7, None), (-30, None)]
)
def test_a_file_cut_short_is_refused_by_name(tmp_path, kept, code):
    write(tmp_path)
    file = tmp_path / "4.dcm"
    file.write_bytes(file.read_bytes()[:kept])
    error = refused(tmp_path, DataError)
    assert error.code == (code or error.code)
    assert error.code in ("dicom-unreadable", "pixels-unreadable")
    assert error.where["file"] == "4.dcm"


@pytest.mark.parametrize("share", np.linspace(0.02, 0.98, 25))
def test_a_slice_cut_anywhere_never_passes(tmp_path, share):
    write(tmp_path)
    file = tmp_path / "5.dcm"  # the last slice: no gap would give its loss away
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    refused(tmp_path, LungsegError)


@pytest.mark.parametrize(
    ("tag", "text"),
    [("PixelSpacing", "0.75"), ("PixelSpacing", "a\\b"), ("RescaleSlope", "?"), ("Rows", None)],
)
def test_values_that_make_no_sense_are_refused_by_name(tmp_path, tag, text):
    def spoil(number: int, dataset: Dataset) -> None:
        if number == 5:
            dataset.add_new(tag, "US" if text is None else "LO", text)

    write(tmp_path, spoil)
    error = refused(tmp_path, DataError)
    assert error.code in ("dicom-unreadable", "pixels-unreadable")
    assert error.where["file"] == "5.dcm"


def test_run_length_compression_is_read(tmp_path):
    hu = write(tmp_path, lambda number, dataset: dataset.compress(RLELossless))
    assert np.array_equal(read_series(tmp_path).volume_hu, hu)


def test_a_compression_without_a_decoder_is_named(tmp_path):
    def claim(number: int, dataset: Dataset) -> None:
        dataset.PixelData = pydicom.encaps.encapsulate([dataset.PixelData])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = MPEG2MPML

    write(tmp_path, claim)
    error = refused(tmp_path, DataError)
    assert error.code == "transfer-syntax"
    assert "MPEG2" in error.where["syntax"]


def test_several_frames_in_a_file_are_refused(tmp_path):
    save(slice_of(scan()[:2], NumberOfFrames=2), tmp_path / "0.dcm")
    save(slice_of(scan()[:2], (0, 0, 2), NumberOfFrames=2), tmp_path / "1.dcm")
    assert refused(tmp_path, DataError).code == "slice-not-2d"


def test_broken_values_put_no_name_or_uid_into_logs_or_warnings(tmp_path, caplog, recwarn):
    caplog.set_level(logging.DEBUG)

    def spoil(number: int, dataset: Dataset) -> None:
        dataset.add_new("SeriesInstanceUID", "UI", SERIES + ".007.x")
        dataset.add_new("PatientID", "LO", "MRN-4711" * 20)

    with pydicom.config.disable_value_validation():
        write(tmp_path, spoil)
    recwarn.clear()
    caplog.clear()
    assert read_series(tmp_path).volume_hu.shape == (6, 4, 5)
    said = caplog.text + " ".join(str(warning.message) for warning in recwarn)
    assert not any(secret in said for secret in SECRETS)


def test_numbers_with_more_digits_than_dicom_allows_are_read_without_a_warning(tmp_path, recwarn):
    def lengthen(number: int, dataset: Dataset) -> None:
        dataset.add_new("PixelSpacing", "DS", ["0.750000000000000000", "0.500000000000000001"])

    with pydicom.config.disable_value_validation():
        write(tmp_path, lengthen)
    recwarn.clear()
    assert read_series(tmp_path).geometry.spacing_mm[1:] == pytest.approx((0.75, 0.5))
    assert [str(warning.message) for warning in recwarn] == []


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
