"""What else lies in folders of DICOM, what is broken, and what messages must not say."""

from __future__ import annotations

import logging

import numpy as np
import pydicom
import pytest
from helpers.ct_slices import OTHER, SECRETS, SERIES, refused, save, scan, slice_of, write
from pydicom.dataset import Dataset
from pydicom.uid import (
    MPEG2MPML,
    MediaStorageDirectoryStorage,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
    generate_uid,
)

from lungseg.errors import DataError, LungsegError
from lungseg.scan.dicom import read_series
from lungseg.scan.series import find_series
from lungseg.telemetry import log


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


def test_a_study_with_reports_and_screen_saves_gives_its_scan(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log("data").parent, "propagate", True)
    hu = write(tmp_path / "chest")
    page = {
        "series": OTHER,
        "ImagePositionPatient": None,
        "ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"],
    }
    save(slice_of(hu[0], SOPClassUID=SecondaryCaptureImageStorage, **page), tmp_path / "dose" / "0.dcm")
    page["SOPClassUID"] = MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    save(slice_of(hu[0], **page), tmp_path / "dose" / "1.dcm")
    report = slice_of(hu[0], Modality="SR", SOPClassUID=XRayRadiationDoseSRStorage)
    del report.PixelData
    save(report, tmp_path / "dose" / "report.dcm")
    assert np.array_equal(read_series(tmp_path).volume_hu, hu)
    assert caplog.text == ""
    save(slice_of(hu[0], series=generate_uid(), ImagePositionPatient=None), tmp_path / "protocol.dcm")
    assert np.array_equal(read_series(tmp_path).volume_hu, hu)
    assert "1 DICOM images without a position are left out" in caplog.text


def test_a_captured_image_within_the_series_is_left_out_and_a_slice_without_position_is_not(tmp_path):
    hu = write(tmp_path)
    save(
        slice_of(hu[0], ImagePositionPatient=None, SOPClassUID=SecondaryCaptureImageStorage),
        tmp_path / "6.dcm",
    )
    assert np.array_equal(read_series(tmp_path).volume_hu, hu)
    save(slice_of(hu[0], ImagePositionPatient=None), tmp_path / "7.dcm")
    assert refused(tmp_path).code == "geometry-missing"


@pytest.mark.parametrize("name", ["5", "1.2.840.113", "5.ima", "5.dcm.part", "IM0005"])
@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"<html>503</html>", "cut"])
def test_any_file_among_slices_that_cannot_be_read_is_refused_by_name(tmp_path, name, content):
    write(tmp_path)
    last = tmp_path / "5.dcm"
    kept = last.read_bytes()[:400] if content == "cut" else content
    last.unlink()
    (tmp_path / name).write_bytes(kept)
    error = refused(tmp_path, DataError)
    assert (error.code, error.where["file"]) == ("dicom-unreadable", name)


def test_all_files_that_cannot_be_read_are_told(tmp_path):
    write(tmp_path)
    for number in range(2, 6):
        (tmp_path / f"{number}.dcm").rename(tmp_path / f"IM{number}")
        (tmp_path / f"IM{number}").write_bytes(b"")
    error = refused(tmp_path, DataError)
    assert error.message == "4 of 6 files could not be read"
    assert error.where["files"] == "IM2, IM3, IM4, IM5"


def test_links_are_followed_once_and_a_dangling_one_is_a_lost_slice(tmp_path):
    hu = write(tmp_path / "store" / "a")
    study = tmp_path / "study"
    (study / "part").mkdir(parents=True)
    for number in range(3):
        (study / "part" / f"{number}.dcm").symlink_to(tmp_path / "store" / "a" / f"{number}.dcm")
    for number in range(3, 6):
        (tmp_path / "store" / "b").mkdir(exist_ok=True)
        (tmp_path / "store" / "a" / f"{number}.dcm").rename(tmp_path / "store" / "b" / f"{number}.dcm")
    (study / "rest").symlink_to(tmp_path / "store" / "b")
    (tmp_path / "store" / "b" / "loop").symlink_to(study)
    assert np.array_equal(read_series(study).volume_hu, hu)
    (tmp_path / "store" / "a" / "0.dcm").unlink()
    error = refused(study, DataError)
    assert (error.code, error.where["file"]) == ("dicom-unreadable", "part/0.dcm")


@pytest.mark.parametrize("tag", ["Modality", "SeriesInstanceUID"])
def test_what_an_anonymiser_took_is_named(tmp_path, tag):
    write(tmp_path, lambda number, dataset: delattr(dataset, tag))
    error = refused(tmp_path, DataError)
    assert (error.code, error.where["file"]) == ("tag-missing", "0.dcm")
    assert error.where["tags"].startswith(tag + " (00")


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


@pytest.mark.parametrize("tag", [b"\x08\x00\x16\x00UI", b"\x08\x00\x60\x00CS", b"\x20\x00\x0e\x00UI"])
def test_a_value_representation_that_does_not_exist_is_refused_by_name(tmp_path, tag):
    """pydicom reads such a file, and fails when the value is asked for."""
    write(tmp_path)
    file = tmp_path / "3.dcm"
    content = file.read_bytes()
    assert content.count(tag) == 1
    file.write_bytes(content.replace(tag, tag[:4] + b"\x55\x00"))
    error = refused(tmp_path, DataError)
    assert (error.code, error.where["file"]) == ("dicom-unreadable", "3.dcm")
