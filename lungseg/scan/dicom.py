"""A CT series as a volume: slices sorted by position, checked, and in HU.

Slices are ordered by their position along the slice normal, never by InstanceNumber or file name, and
their distance comes from the positions, never from SliceThickness. A series that is not one regular
grid is refused: a missing or doubled slice would move every nodule above it.

Fault -> behaviour (tests: tests/scan/test_dicom*.py):
  localizers, reports, screen saves, other modalities     left out
  files that cannot be read, links without a target       "dicom-unreadable", naming all of them
  Modality or SeriesInstanceUID missing                   "tag-missing"
  preamble or file meta missing                           read
  JPEG lossless, JPEG-LS, JPEG 2000 (GDCM), RLE, deflated, big endian, implicit VR   read
  bits above BitsStored                                   masked out; PixelPaddingValue and range become air
  MONOCHROME1                                             read: it turns the display, not the HU
  the same file twice (one SOPInstanceUID, equal pixels)  read once
  two slices at one position                              "slices-duplicate"
  slices missing, uneven, tilted, of two grids  "slices-missing", "-irregular", "-mixed", "gantry-tilt"
  cut short, values that are no numbers                   "dicom-unreadable", "pixels-unreadable"
  multi-frame (enhanced CT), colours                      "slice-not-2d"
  slope, intercept or position missing                    "rescale-missing", "geometry-missing"
  positions or pixels in metres or microns                "spacing-implausible"
  RescaleType of other units, values that are no HU       read; `Volume.not_hu` says why
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset
from pydicom.pixels import get_decoder
from pydicom.uid import EnhancedCTImageStorage, ImplicitVRLittleEndian

from lungseg.errors import DataError, GeometryError
from lungseg.scan.plausible import not_hu, require_spacing
from lungseg.scan.series import BROKEN, broken, choose_series, find_series, read_dataset, shown
from lungseg.scan.volume import AIR_HU, Geometry, Volume, vector

THREADS = 4
IN_PLANE_TOLERANCE_MM = 0.1
LATTICE_TOLERANCE = 0.1  # of the slice distance; positions are often written with few decimals
# PS3.3, C.11.1.1.2. US is "unspecified", as older scanners write; their values are judged like all others.
HU_UNITS = {"", "HU", "HU_MOD", "US"}
OTHER_UNITS = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}
GEOMETRY_TAGS = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


@dataclass(frozen=True)
class _Slice:
    name: str  # of the file, relative to the folder
    instance: str  # its SOPInstanceUID
    position: np.ndarray  # LPS mm of the centre of the first pixel
    orientation: np.ndarray  # [2, 3]: unit vectors along a row and along a column
    pixel_mm: np.ndarray  # (y, x)
    hu: np.ndarray  # int16 [y, x]
    unit: str  # RescaleType


def read_series(folder: Path, series_uid: str | None = None) -> Volume:
    """The CT series of `folder`, or the one of `series_uid` where there are several.

    HU come from each slice's own slope and intercept, padding becomes air (-1024), and values are
    rounded and clipped to int16. The z axis is the slice normal, (row) x (column).

    Raises DataError: "folder-missing", "series-none", "series-ambiguous", "series-missing",
    "dicom-unreadable", "tag-missing", "transfer-syntax", "pixels-unreadable", "slice-not-2d",
    "rescale-missing".
    Raises GeometryError: "geometry-missing", "slices-mixed", "orientation-invalid", "slices-too-few",
    "slices-duplicate", "slices-missing", "gantry-tilt", "slices-irregular", "spacing-implausible".
    """
    folder = Path(folder)
    return read_slices(choose_series(find_series(folder), folder, series_uid), folder)


def read_slices(files: Sequence[Path], folder: Path) -> Volume:
    """The volume of one series' files, as `find_series` lists them for `folder`. Raises as `read_series`."""
    with ThreadPoolExecutor(THREADS) as pool:
        slices = list(pool.map(lambda path: _read_slice(path, folder), files))
    return _stack(slices)


def _read_slice(path: Path, folder: Path) -> _Slice:
    name = shown(path.relative_to(folder))
    try:
        dataset = read_dataset(path)
        frames = str(dataset.get("NumberOfFrames") or 1)
        if frames != "1" or dataset.get("SOPClassUID") == EnhancedCTImageStorage:
            raise _not_2d(name, f"{frames} frames")
        missing = [tag for tag in GEOMETRY_TAGS if not dataset.get(tag)]
        if missing:
            remedy = "export the original axial slices, not a derived image"
            raise GeometryError("geometry-missing", file=name, tags=" ".join(missing), remedy=remedy)
        position = np.array(dataset.ImagePositionPatient, np.float64).reshape(3)
        orientation = np.array(dataset.ImageOrientationPatient, np.float64).reshape(2, 3)
        pixel_mm = np.array(dataset.PixelSpacing, np.float64).reshape(2)
        if not np.isfinite([*position, *orientation.ravel(), *pixel_mm]).all() or pixel_mm.min() <= 0:
            raise ValueError("a position, orientation or spacing that is none")
        hu = _hu(dataset, name)
        unit = str(dataset.get("RescaleType") or "")
        return _Slice(name, str(dataset.get("SOPInstanceUID")), position, orientation, pixel_mm, hu, unit)
    except BROKEN as error:  # values that are no numbers, or too few
        raise broken(path, folder) from error


def _hu(dataset: FileDataset, name: str) -> np.ndarray:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        remedy = "export the slices with RescaleSlope and RescaleIntercept, or HU are unknown"
        raise DataError("rescale-missing", file=name, remedy=remedy)
    slope, intercept = float(slope), float(intercept)
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise ValueError("a rescale that loses the pixels")
    raw = _pixels(dataset, name)
    limits = np.iinfo(np.int16)
    stored = _stored_bits(dataset, raw)
    if slope == 1 and intercept.is_integer() and abs(intercept) < 2**30 and stored.dtype.itemsize <= 2:
        scaled = stored.astype(np.int32) + np.int32(intercept)  # most CT; floats would take longer
    else:
        scaled = np.rint(stored * slope + intercept)
    hu = np.clip(scaled, limits.min, limits.max).astype(np.int16)
    padding = dataset.get("PixelPaddingValue")
    if padding is not None:
        bound = dataset.get("PixelPaddingRangeLimit", padding)
        # Some scanners write a negative padding as unsigned 16 bit: compare in the pixels' own type.
        first, last = sorted(np.array([padding, bound]).astype(raw.dtype).tolist())
        hu[(raw >= first) & (raw <= last)] = AIR_HU
    return hu


def _stored_bits(dataset: FileDataset, raw: np.ndarray) -> np.ndarray:
    """Native pixels without what lies outside their stored bits (old overlays, or garbage)."""
    stored, high = int(dataset.BitsStored), int(dataset.get("HighBit", dataset.BitsStored - 1))
    bits = 8 * raw.dtype.itemsize
    if dataset.file_meta.TransferSyntaxUID.is_compressed or (stored, high) == (bits, bits - 1):
        return raw  # a decoder gives the stored bits alone
    if not 0 < stored <= high + 1 <= bits:
        raise ValueError("stored bits that do not fit")
    return raw << (bits - 1 - high) >> (bits - stored)


def _not_2d(name: str, found: str) -> DataError:
    remedy = "give classic CT slices, one grey image a file (enhanced CT: split it, for example with emf2sf)"
    return DataError("slice-not-2d", file=name, found=found, remedy=remedy)


def _pixels(dataset: FileDataset, name: str) -> np.ndarray:
    syntax = dataset.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:  # what pydicom says of a syntax that it has no decoder for at all
        available = False
    if not available:
        remedy = "decompress the series first, for example with gdcmconv --raw or dcmdjpeg"
        raise DataError("transfer-syntax", file=name, syntax=syntax.name, remedy=remedy)
    try:
        if not syntax.is_compressed:
            # Padding may lie outside the stored bits: `_stored_bits` masks them after it was compared.
            dataset.pixel_array_options(correct_unused_bits=False)
        raw = dataset.pixel_array
    except BROKEN as error:
        remedy = "fetch this file again, it is cut short or damaged"
        raise DataError("pixels-unreadable", file=name, remedy=remedy) from error
    grey = dataset.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
    if raw.ndim != 2 or not grey or raw.dtype.kind not in "iu":
        raise _not_2d(name, f"{dataset.get('PhotometricInterpretation')} of shape {raw.shape}")
    return raw


def _stack(slices: list[_Slice]) -> Volume:
    """One volume of slices in any order, after every check of `read_series`."""
    slices = _without_copies(slices)
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
    require_spacing((distance, *head.pixel_mm), file=head.name)
    axes = np.stack([row, column, normal], axis=1)
    depth, height, width = len(slices), *head.hu.shape
    geometry = Geometry(
        (depth, height, width),
        vector((distance, *head.pixel_mm)),
        vector(slices[0].position),
        (vector(axes[0]), vector(axes[1]), vector(axes[2])),
    )
    volume_hu = np.stack([one.hu for one in slices])
    return Volume(volume_hu, geometry, _other_unit(slices) or not_hu(volume_hu))


def _other_unit(slices: list[_Slice]) -> str:
    """What RescaleType says, unless it may be HU."""
    units = {one.unit for one in slices} - HU_UNITS
    if not units:
        return ""
    named = ", ".join(sorted(units & OTHER_UNITS)) or "another unit"  # a value of its own may say anything
    return f"the tag RescaleType (0028,1054) says {named}"


def _without_copies(slices: list[_Slice]) -> list[_Slice]:
    """The slices without second copies of a file: copies agree in UID, position and every pixel."""
    kept: dict[str, _Slice] = {}
    others = []
    for one in slices:
        first = kept.setdefault(one.instance, one)
        same = np.array_equal(first.position, one.position) and np.array_equal(first.hu, one.hu)
        if first is not one and not same:
            others.append(one)  # the checks of the grid decide
    return [*kept.values(), *others]


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
