"""A CT series as a volume: slices sorted by position, checked, and in HU.

Slices are ordered by their position along the slice normal, never by InstanceNumber or file name, and
their distance comes from the positions, never from SliceThickness. A series that is not one regular
grid is refused: a missing or doubled slice would move every nodule above it. Messages name files
relative to the folder, never a tag of the patient, and no UID (TCIA names folders so) but for its end.
"""

from __future__ import annotations

import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import get_decoder
from pydicom.uid import ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from lungseg.data.volume import AIR_HU, Geometry, Volume, vector
from lungseg.errors import DataError, GeometryError

UID = re.compile(r"\d+(?:\.\d+){4,}")
DICOMDIR = MediaStorageDirectoryStorage
THREADS = 4
IN_PLANE_TOLERANCE_MM = 0.1
LATTICE_TOLERANCE = 0.1  # of the slice distance; positions are often written with few decimals
# What pydicom raises on broken files, besides InvalidDicomError for a missing preamble.
BROKEN = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error)
GEOMETRY_TAGS = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
HEADER_TAGS = ["Modality", "SeriesInstanceUID", "ImageType"]


@dataclass(frozen=True)
class _Slice:
    name: str  # of the file, relative to the folder
    position: np.ndarray  # LPS mm of the centre of the first pixel
    orientation: np.ndarray  # [2, 3]: unit vectors along a row and along a column
    pixel_mm: np.ndarray  # (y, x)
    hu: np.ndarray  # int16 [y, x]


def find_series(folder: Path) -> dict[str, list[Path]]:
    """Files of each CT series in `folder` and below, by series UID; localizers are left out.

    Files that are clearly not DICOM (no preamble, and not named .dcm) and hidden files are ignored.
    Raises DataError("folder-missing" or "dicom-unreadable").
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError("folder-missing", folder=_shown(folder), remedy="give the folder of a DICOM series")
    series: dict[str, list[Path]] = {}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    with disable_value_validation():  # its warnings quote values, so also names
        for path in files:
            header = _dataset(path, folder, HEADER_TAGS)
            if header is None or header.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
                continue
            if not header.get("Modality") or not header.get("SeriesInstanceUID"):
                # Cut short within the header: to leave it out could lose the last slice silently.
                raise _broken(path, folder)
            if header.Modality == "CT" and "LOCALIZER" not in (header.get("ImageType") or ()):
                series.setdefault(str(header.SeriesInstanceUID), []).append(path)
    return series


def read_series(folder: Path, series_uid: str | None = None) -> Volume:
    """The CT series of `folder`, or the one of `series_uid` where there are several.

    HU come from each slice's own slope and intercept, padding becomes air (-1024), and values are
    rounded and clipped to int16. The z axis is the slice normal, (row) x (column).

    Raises DataError: "folder-missing", "series-none", "series-ambiguous", "series-missing",
    "dicom-unreadable", "transfer-syntax", "pixels-unreadable", "slice-not-2d", "rescale-missing".
    Raises GeometryError: "geometry-missing", "slices-mixed", "orientation-invalid", "slices-too-few",
    "slices-duplicate", "slices-missing", "gantry-tilt", "slices-irregular".
    """
    folder = Path(folder)
    files = _choose(find_series(folder), folder, series_uid)
    with ThreadPoolExecutor(THREADS) as pool:
        slices = list(pool.map(lambda path: _read_slice(path, folder), files))
    return _stack(slices)


def _choose(series: dict[str, list[Path]], folder: Path, series_uid: str | None) -> list[Path]:
    if not series:
        raise DataError(
            "series-none", folder=_shown(folder), remedy="give a folder with CT slices in DICOM format"
        )
    if series_uid is not None:
        if series_uid not in series:
            raise DataError(
                "series-missing", folder=_shown(folder), remedy="ask for a series that is in the folder"
            )
        return series[series_uid]
    if len(series) > 1:
        listing = "; ".join(
            f"{number}: {len(files)} slices, first {_shown(files[0].relative_to(folder))}"
            for number, files in enumerate(series.values(), 1)
        )
        remedy = "give a folder that holds one series only"
        raise DataError("series-ambiguous", folder=_shown(folder), message=listing, remedy=remedy)
    return next(iter(series.values()))


def _dataset(path: Path, folder: Path, tags: list[str] | None = None) -> FileDataset | None:
    """The data set of a file, or None if it is clearly not DICOM."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=tags is not None, specific_tags=tags)
    except InvalidDicomError as error:
        if path.suffix.lower() != ".dcm":
            return None
        raise _broken(path, folder) from error
    except BROKEN as error:
        raise _broken(path, folder) from error


def _broken(path: Path, folder: Path) -> DataError:
    return DataError(
        "dicom-unreadable", file=_shown(path.relative_to(folder)), remedy="fetch this file again"
    )


def _shown(path: Path) -> str:
    return UID.sub(lambda uid: "…" + uid[0][-6:], str(path))


def _read_slice(path: Path, folder: Path) -> _Slice:
    name = _shown(path.relative_to(folder))
    dataset = _dataset(path, folder)
    assert dataset is not None  # find_series has read its header
    try:
        missing = [tag for tag in GEOMETRY_TAGS if not dataset.get(tag)]
        if missing:
            remedy = "export the original axial slices, not a derived image"
            raise GeometryError("geometry-missing", file=name, tags=" ".join(missing), remedy=remedy)
        return _Slice(
            name,
            np.array(dataset.ImagePositionPatient, np.float64).reshape(3),
            np.array(dataset.ImageOrientationPatient, np.float64).reshape(2, 3),
            np.array(dataset.PixelSpacing, np.float64).reshape(2),
            _hu(dataset, name),
        )
    except BROKEN as error:  # values that are no numbers, or too few
        raise _broken(path, folder) from error


def _hu(dataset: FileDataset, name: str) -> np.ndarray:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        remedy = "export the slices with RescaleSlope and RescaleIntercept, or HU are unknown"
        raise DataError("rescale-missing", file=name, remedy=remedy)
    raw = _pixels(dataset, name)
    limits = np.iinfo(np.int16)
    hu = np.clip(np.rint(raw * float(slope) + float(intercept)), limits.min, limits.max).astype(np.int16)
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        bound = dataset.get("PixelPaddingRangeLimit", padding)
        # Some scanners write a negative padding as unsigned 16 bit: compare in the pixels' own type.
        first, last = sorted(np.array([padding, bound]).astype(raw.dtype).tolist())
        hu[(raw >= first) & (raw <= last)] = AIR_HU
    return hu


def _pixels(dataset: FileDataset, name: str) -> np.ndarray:
    syntax = dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        remedy = "decompress the series first, for example with gdcmconv --raw or dcmdjpeg"
        raise DataError("transfer-syntax", file=name, syntax=syntax.name, remedy=remedy)
    try:
        raw = dataset.pixel_array
    except BROKEN as error:
        remedy = "fetch this file again, it is cut short or damaged"
        raise DataError("pixels-unreadable", file=name, remedy=remedy) from error
    if raw.ndim != 2:
        remedy = "give classic CT slices, one grey image a file"
        raise DataError("slice-not-2d", file=name, shape=raw.shape, remedy=remedy)
    return raw


def _stack(slices: list[_Slice]) -> Volume:
    """One volume of slices in any order, after every check of `read_series`."""
    if len(slices) < 2:
        raise GeometryError("slices-too-few", slices=len(slices), remedy="give the whole series")
    head = slices[0]
    for one in slices[1:]:
        same = (
            one.hu.shape == head.hu.shape
            and np.allclose(one.orientation, head.orientation, rtol=0, atol=1e-3)
            and np.allclose(one.pixel_mm, head.pixel_mm, rtol=1e-3, atol=0)
        )
        if not same:
            remedy = "keep only slices of one size, pixel spacing and orientation"
            raise GeometryError("slices-mixed", file=one.name, differs_from=head.name, remedy=remedy)
    row, column = head.orientation
    if not np.allclose(head.orientation @ head.orientation.T, np.eye(2), atol=1e-3):
        raise GeometryError("orientation-invalid", file=head.name, remedy="export the series again")
    row = row / np.linalg.norm(row)
    # Rounded headers are not quite at right angles, which NIfTI and ITK insist on.
    column = column - (column @ row) * row
    column /= np.linalg.norm(column)
    normal = np.cross(row, column)
    slices = sorted(slices, key=lambda one: float(one.position @ normal))
    distance = _checked_distance(slices, normal)
    axes = np.stack([row, column, normal], axis=1)
    depth, height, width = len(slices), *head.hu.shape
    geometry = Geometry(
        (depth, height, width),
        vector((distance, *head.pixel_mm)),
        vector(slices[0].position),
        (vector(axes[0]), vector(axes[1]), vector(axes[2])),
    )
    return Volume(np.stack([one.hu for one in slices]), geometry)


def _checked_distance(slices: list[_Slice], normal: np.ndarray) -> float:
    """Distance in mm of slices that are sorted along `normal`, or a GeometryError."""
    positions = np.stack([one.position for one in slices])
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))

    def pair(at: int) -> str:
        return f"{slices[at].name} and {slices[at + 1].name}"

    nearest, widest = int(np.argmin(gaps)), int(np.argmax(gaps))
    if gaps[nearest] < 1e-3 or gaps[nearest] < LATTICE_TOLERANCE * usual:
        remedy = "keep one slice for each position; two scans may be mixed in the folder"
        raise GeometryError("slices-duplicate", files=pair(nearest), remedy=remedy)
    if gaps[widest] > 1.5 * usual:
        missing = int(np.rint(np.maximum(gaps / usual - 1, 0)).sum())
        remedy = "fetch the whole series again"
        raise GeometryError("slices-missing", between=pair(widest), missing=missing, remedy=remedy)
    drift = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(drift, axis=1).max() > IN_PLANE_TOLERANCE_MM:
        remedy = "the slices are sheared (gantry tilt): resample the series to a straight grid first"
        raise GeometryError("gantry-tilt", file=slices[-1].name, remedy=remedy)
    distance = float(along[-1] - along[0]) / (len(slices) - 1)
    off = np.abs(along - along[0] - distance * np.arange(len(slices)))
    if off.max() > LATTICE_TOLERANCE * distance:
        at = slices[int(np.argmax(off))].name
        remedy = "resample the series to equal slice distances first"
        raise GeometryError("slices-irregular", file=at, off_by_mm=round(float(off.max()), 3), remedy=remedy)
    return distance
