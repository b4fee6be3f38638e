"""Which files of a folder are the slices of a CT series.

A file that is no DICOM is left out in silence only where its name says so: hidden, text, a picture, a
DICOMDIR. Any other that cannot be read stops the reading, since it may be a slice, and one that is lost at
the end of a series leaves no gap. Messages name files relative to the folder, never a tag of the patient, and
no UID (TCIA names folders so) but for its end.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.tag import Tag
from pydicom.uid import (
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
)

from lungseg.errors import DataError
from lungseg.scan.volume import split_name
from lungseg.telemetry import log

# What pydicom raises on broken files, besides InvalidDicomError for a missing preamble.
BROKEN = (
    OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error,
    BytesLengthException,
)  # fmt: skip
UID = re.compile(r"\d+(?:\.\d+){4,}")
# How a data set without a preamble begins: an element of group 2 or 8, in either byte order.
BARE_START = re.compile(
    rb"\x02\0[\0\x10]\0|\x08\0[\0\x01\x05\x08\x16\x18]\0|\0\x08\0[\0\x01\x05\x08\x16\x18]"
)
HEADER_TAGS = ["Modality", "SeriesInstanceUID", "ImageType", "SOPClassUID", "ImagePositionPatient"]
FOREIGN_NAMES = {"dicomdir", "readme", "license", "version", "changelog", "lockfile"}
FOREIGN_SUFFIXES = {
    ".txt", ".md", ".csv", ".tsv", ".log", ".htm", ".html", ".css", ".js", ".pdf", ".doc", ".docx", ".xls",
    ".xlsx", ".xml", ".xsl", ".json", ".yaml", ".yml", ".ini", ".inf", ".db", ".npy", ".npz", ".h5", ".raw",
    ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".ico", ".mp4", ".exe", ".dll", ".bat",
    ".sh", ".py", ".zip", ".tar", ".7z", ".rar", ".md5", ".sha256",
}  # fmt: skip
SHOWN_FILES = 10


def find_series(folder: Path) -> dict[str, list[Path]]:
    """The files of each CT series in `folder` and below, by series UID.

    Localizers, other modalities and what cannot be a volume (reports, screen saves) are left out.
    Raises DataError: "folder-missing", "dicom-unreadable", "tag-missing".
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("folder-missing", folder=shown(folder), remedy="give the folder of a DICOM series")
    series: dict[str, list[Path]] = {}
    positioned: set[str] = set()
    lost = []
    files = _files(folder)
    with disable_value_validation():  # its warnings quote values, so also names
        for path in files:
            try:
                header = read_dataset(path, HEADER_TAGS)
                if not _is_ct_slice(header, path, folder):
                    continue
                uid = str(header.SeriesInstanceUID)
            except InvalidDicomError:
                lost += [] if _is_foreign(path) else [path]
            except BROKEN:  # of a value too: pydicom reads it only when it is asked for
                lost.append(path)
            else:
                series.setdefault(uid, []).append(path)
                positioned |= {uid} if _has_position(header) else set()
    if lost:
        raise _unreadable(lost, len(files), folder)
    return _that_can_be_volumes(series, positioned)


def choose_series(series: dict[str, list[Path]], folder: Path, series_uid: str | None) -> list[Path]:
    """The files of `series_uid`, or of the only series there is.

    Raises DataError: "series-none", "series-missing", "series-ambiguous".
    """
    if not series:
        remedy = "give a folder with CT slices in DICOM format"
        raise DataError("series-none", folder=shown(folder), remedy=remedy)
    if series_uid is not None:
        if series_uid not in series:
            remedy = "ask for a series that is in the folder"
            raise DataError("series-missing", folder=shown(folder), remedy=remedy)
        return series[series_uid]
    if len(series) > 1:
        listing = "; ".join(
            f"{number}: {len(files)} slices, first {shown(files[0].relative_to(folder))}"
            for number, files in enumerate(series.values(), 1)
        )
        remedy = "give a folder that holds one series only"
        raise DataError("series-ambiguous", folder=shown(folder), message=listing, remedy=remedy)
    return next(iter(series.values()))


def read_dataset(path: Path, tags: list[str] | None = None) -> FileDataset:
    """The whole data set of a file, or its `tags` alone, with or without DICOM's preamble.

    Raises InvalidDicomError if the file is no DICOM, and any of BROKEN.
    """
    try:
        return pydicom.dcmread(path, stop_before_pixels=tags is not None, specific_tags=tags)
    except InvalidDicomError:
        with path.open("rb") as file:
            if not BARE_START.match(file.read(4)):
                raise
    dataset = pydicom.dcmread(path, stop_before_pixels=tags is not None, specific_tags=tags, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding  # what pydicom found it to be
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def broken(path: Path, folder: Path) -> DataError:
    return DataError("dicom-unreadable", file=shown(path.relative_to(folder)), remedy="fetch this file again")


def shown(path: Path) -> str:
    """A path without the UIDs in it, but for their ends."""
    return UID.sub(lambda uid: "…" + uid[0][-6:], str(path))


def _files(folder: Path) -> list[Path]:
    """All files in `folder` and below that are not hidden. Links are followed, into each folder once, and a
    link whose target is gone counts as a file."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real not in seen:
            found += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(path for path in found if path.is_file() or path.is_symlink())


def _is_foreign(path: Path) -> bool:
    if path.is_symlink() and not path.exists():
        return False
    return (
        path.name.lower() in FOREIGN_NAMES
        or path.suffix.lower() in FOREIGN_SUFFIXES
        or bool(split_name(path.name)[1])
    )


def _is_ct_slice(header: FileDataset, path: Path, folder: Path) -> bool:
    """Whether a file may be a slice, and not a localizer, a report, a screen save or another modality.

    Raises DataError("tag-missing"), or ValueError if the file was cut short within its header.
    """
    if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return False
    missing = [tag for tag in ("Modality", "SeriesInstanceUID") if not header.get(tag)]
    of_ct = missing or header.Modality == "CT"
    if (missing or (of_ct and not _has_position(header))) and "PixelData" not in read_dataset(path):
        raise ValueError("cut short: to leave it out could lose the last slice")
    if missing:
        names = ", ".join(f"{tag} {Tag(tag)}" for tag in missing)
        remedy = "export the series again with these tags, or write them, for example with dcmodify -i"
        raise DataError("tag-missing", file=shown(path.relative_to(folder)), tags=names, remedy=remedy)
    # The newer classes of captured images add a number to the first one's.
    captured = f"{header.get('SOPClassUID')}.".startswith(f"{SecondaryCaptureImageStorage}.")
    flat = captured and not _has_position(header)
    return header.Modality == "CT" and "LOCALIZER" not in (header.get("ImageType") or ()) and not flat


def _has_position(header: FileDataset) -> bool:
    """Whether a file says where its pixels lie; several frames say it in another module."""
    return bool(header.get("ImagePositionPatient")) or header.get("SOPClassUID") == EnhancedCTImageStorage


def _that_can_be_volumes(series: dict[str, list[Path]], positioned: set[str]) -> dict[str, list[Path]]:
    """`series` without pages of a protocol or a dose: those of which no image says where it lies. Where all
    are like that, they stay, and the reading of slices names what is missing."""
    flat = series.keys() - positioned
    if not positioned or not flat:
        return series
    count = sum(len(series[uid]) for uid in flat)
    log("data").warning("%d DICOM images without a position are left out: they cannot be a volume", count)
    return {uid: files for uid, files in series.items() if uid in positioned}


def _unreadable(lost: list[Path], files: int, folder: Path) -> DataError:
    if len(lost) == 1:
        return broken(lost[0], folder)
    names = [shown(path.relative_to(folder)) for path in lost]
    listing = ", ".join(names[:SHOWN_FILES])
    if len(names) > SHOWN_FILES:
        listing += f" and {len(names) - SHOWN_FILES} more"
    remedy = "fetch these files again, or take what is no slice out of the folder"
    message = f"{len(lost)} of {files} files could not be read"
    return DataError("dicom-unreadable", message=message, files=listing, remedy=remedy)
