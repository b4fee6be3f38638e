"""DICOM in which everything that could tell of a patient bears a mark that can be searched for."""

from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom.datadict import DicomDictionary

UID = "1.2.77777.13.987654"
VALUES = {
    "AE": "MARKAE",
    "CS": "MARKCS",
    "DA": "19411203",
    "DT": "19411203133742.987654",
    "LO": "MARKLO",
    "LT": "MARKLT",
    "PN": "MARKPN^Zoë",
    "SH": "MARKSH",
    "ST": "MARKST",
    "TM": "133742.987654",
    "UC": "MARKUC",
    "UI": UID,
    "UR": "http://MARKUR",
    "UT": "MARKUT",
}
MARKS = (b"MARK", b"19411203", b"133742.987", b"77777.13.987", b"776655443", b"77.6655443")
GROUPS_OF_PIXELS_AND_FILES = (0x0000, 0x0002, 0x0004, 0x0028, 0x7FE0, 0xFFFE)
OF_PATIENTS = (
    ("PatientName", "PN"),
    ("PatientID", "LO"),
    ("PatientBirthDate", "DA"),
    ("PatientAddress", "LO"),
    ("AccessionNumber", "SH"),
    ("InstitutionName", "LO"),
    ("ReferringPhysicianName", "PN"),
    ("StudyDate", "DA"),
    ("StudyTime", "TM"),
    ("StudyID", "SH"),
    ("StudyDescription", "LO"),
    ("SeriesDescription", "LO"),
    ("ImageComments", "LT"),
    ("StudyInstanceUID", "UI"),
    ("FrameOfReferenceUID", "UI"),
)


def mark_download(root: Path) -> list[bytes]:
    """Mark every file, and the name of every file and folder, below `root`; gives what must not be found
    elsewhere: the marks and the series' own UIDs."""
    found = set(MARKS)
    for folder in sorted({path.parent for path in root.rglob("*.dcm")}):
        for number, path in enumerate(sorted(folder.glob("*.dcm")), 1):
            found.add(_mark(path, number).encode())
            path.rename(path.with_name(f"MARKFILE-{number:03d}.dcm"))
    deepest_first = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True)
    for number, folder in enumerate(deepest_first):
        folder.rename(folder.with_name(f"MARKNAME^ERIKA 19411203 {number}"))
    return sorted(found)


def _mark(path: Path, number: int) -> str:
    """The first file of a series gets every tag of a text VR that the standard knows."""
    dataset = pydicom.dcmread(path)
    for keyword, vr in OF_PATIENTS:
        setattr(dataset, keyword, VALUES[vr])
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{UID}.{number}"
    dataset.AcquisitionNumber, dataset.PatientWeight = 776655443, "77.6655443"
    dataset.private_block(0x0011, "MARKPRIVATE", create=True).add_new(0x01, "LO", "MARKPRIVATE")
    if number == 1:
        for tag, (vr, _, _, retired, _) in DicomDictionary.items():
            known = vr in VALUES and not retired and tag >> 16 not in GROUPS_OF_PIXELS_AND_FILES
            if known and tag not in dataset:
                dataset.add_new(tag, vr, VALUES[vr])
    dataset.save_as(path)
    return str(dataset.SeriesInstanceUID)
