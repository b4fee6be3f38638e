"""What `predict --dicom` writes for a viewer or an archive: the nodules as DICOM Segmentation and their
measurements as Structured Report.

Both belong to the patient's study, so they carry the patient's name and number; nothing else that lungseg
writes does. They have a folder of their own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from highdicom import UID
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from lungseg.errors import DataError
from lungseg.scan.series import BROKEN, read_dataset
from lungseg.segment.inputs import Input
from lungseg.segment.outputs.dicomseg import nodule_segments
from lungseg.segment.outputs.nifti import replaced
from lungseg.segment.outputs.structured import measurement_report
from lungseg.segment.predict import Segmentation

REPORT, SEGMENTS = "report.dcm", "segmentation.dcm"
NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")
# Of type 2: the standard allows them empty, but not missing.
MAY_BE_EMPTY = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


@contextmanager
def unheard() -> Iterator[None]:
    """Without the warnings of pydicom and highdicom, which quote the values of tags, so also names."""
    log = logging.getLogger("highdicom")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


@unheard()
def read_source(one: Input) -> list[Dataset]:
    """The headers of a scan's slices in the order of its volume; tags that may be empty are there.

    Raises DataError("dicom-needed") for another kind of input, and DataError("tag-missing").
    """
    if not one.slices:
        remedy = "give the scan's DICOM folder, or leave --dicom out"
        raise DataError("dicom-needed", input=one.path, remedy=remedy)
    headers = {}
    for path in one.slices:
        header = read_dataset(path)
        del header.PixelData
        missing = [tag for tag in NEEDED if not header.get(tag)]
        if missing:
            remedy = "export the series again with these tags, or leave --dicom out"
            raise DataError("tag-missing", file=path.name, tags=" ".join(missing), remedy=remedy)
        for tag in MAY_BE_EMPTY:
            if tag not in header:
                setattr(header, tag, "")
        headers[header.SOPInstanceUID] = header  # a file may be there twice
    row, column = np.reshape(next(iter(headers.values())).ImageOrientationPatient, (2, 3)).astype(float)
    normal = np.cross(row, column)
    return sorted(headers.values(), key=lambda one: float(normal @ np.array(one.ImagePositionPatient, float)))


def require_own(folder: Path, source: Sequence[Dataset]) -> None:
    """Raises DataError("output-foreign") unless `folder` is missing or holds an earlier report on this
    study."""
    if not folder.exists():
        return
    try:
        foreign = {path.name for path in folder.iterdir()} - {REPORT, SEGMENTS}
        study = dcmread(folder / REPORT, specific_tags=["StudyInstanceUID"]).StudyInstanceUID
    except (InvalidDicomError, *BROKEN):
        study = None
    if study != source[0].StudyInstanceUID or foreign:
        remedy = "give another --dicom, or remove what is there"
        raise DataError("output-foreign", folder=folder, remedy=remedy)


@unheard()
def write(
    segmentation: Segmentation, source: Sequence[Dataset], folder: Path, *, run: str, checkpoint: str
) -> None:
    """Write `folder`/report.dcm and, where there are nodules, `folder`/segmentation.dcm, both or none.

    `source` is as `read_source` gives it. Raises as `require_own`, DataError("dicom-header-invalid") where
    the patient's or study's tags cannot be copied, and DataError("output-unwritable").
    """
    require_own(folder, source)
    tracking = [str(UID()) for _ in segmentation.nodules]
    parameters = {"run": run, "checkpoint": checkpoint, "threshold": f"{segmentation.config.threshold:g}"}
    try:
        segments = None
        if segmentation.nodules:
            segments = nodule_segments(segmentation, source, tracking, parameters)
        report = measurement_report(segmentation, source, segments, tracking, parameters)
    except (ValueError, TypeError, AttributeError) as error:
        remedy = "correct the tags of patient and study, or leave --dicom out"
        # Their values would be in its own message.
        raise DataError("dicom-header-invalid", folder=folder, remedy=remedy) from error
    with replaced(folder) as fresh:
        report.save_as(fresh / REPORT)
        if segments is not None:
            segments.save_as(fresh / SEGMENTS)
