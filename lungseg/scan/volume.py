"""A scan as HU array and geometry: reading of NIfTI, NRRD and MetaImage, writing of NIfTI.

Arrays are [z, y, x]; indices, shapes and spacings are (z, y, x); patient coordinates are (x, y, z) in
DICOM's LPS millimetres (x to the patient's left, y to the back, z to the head). An index names the
centre of a voxel, so a volume reaches half a voxel beyond its first and last centres.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813

from lungseg.errors import DataError, GeometryError

AIR_HU = -1024
ITK_READERS = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
SUFFIXES = (".nii.gz", ".nii", *ITK_READERS)

# The datatype codes of nifti1.h and NumPy's names of them.
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
NIFTI_TYPES |= {16: "f4", 64: "f8"}

Vector = tuple[float, float, float]


def vector(values: Iterable[float]) -> Vector:
    """Three plain floats of any three numbers, for the frozen `Geometry`."""
    x, y, z = (float(value) for value in values)
    return x, y, z


@dataclass(frozen=True)
class Geometry:
    """Where a grid lies in the patient.

    `spacing_mm` is (z, y, x). `origin_lps_mm` is the patient coordinate (x, y, z) of the centre of
    voxel [0, 0, 0]. The columns of `direction_lps` are the unit vectors of the x, y and z index axes
    (SimpleITK's order).
    """

    shape_zyx: tuple[int, int, int]
    spacing_mm: Vector
    origin_lps_mm: Vector
    direction_lps: tuple[Vector, Vector, Vector]

    def to_lps_mm(self, index_zyx: np.ndarray | tuple[float, ...]) -> np.ndarray:
        """Patient coordinates (x, y, z) in mm of (fractional) indices [..., 3] (z, y, x)."""
        steps_xyz = np.asarray(index_zyx, np.float64)[..., ::-1] * self.spacing_mm[::-1]
        return steps_xyz @ np.asarray(self.direction_lps).T + self.origin_lps_mm

    def to_index_zyx(self, lps_mm: np.ndarray | tuple[float, ...]) -> np.ndarray:
        """The inverse of `to_lps_mm`: fractional indices [..., 3] (z, y, x)."""
        offset_xyz = np.asarray(lps_mm, np.float64) - self.origin_lps_mm
        # A direction matrix is orthonormal: its inverse is its transpose.
        return (offset_xyz @ np.asarray(self.direction_lps) / self.spacing_mm[::-1])[..., ::-1]

    def part(self, box: tuple[slice, ...]) -> Geometry:
        """The grid of the voxels in `box`."""
        depth, height, width = (side.stop - side.start for side in box)
        first = vector(self.to_lps_mm(np.array([side.start for side in box])))
        return replace(self, shape_zyx=(depth, height, width), origin_lps_mm=first)


@dataclass(frozen=True)
class Volume:
    """`volume_hu` is int16 [z, y, x] on the grid of `geometry`."""

    volume_hu: np.ndarray
    geometry: Geometry


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds every nonzero voxel of `mask` [z, y, x]; () where there is none."""
    sides = [np.flatnonzero(mask.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(side[0]), int(side[-1]) + 1) for side in sides) if sides[0].size else ()


def split_name(name: str) -> tuple[str, str]:
    """The stem of a file's name and which of SUFFIXES it has, in any case of letters; "" where none."""
    suffix = next((one for one in SUFFIXES if name.lower().endswith(one)), "")
    return name[: len(name) - len(suffix)], suffix


def read_image(path: Path) -> Volume:
    """A CT scan in HU, rounded and clipped to int16.

    Raises DataError: "image-missing", "image-unreadable", "image-not-3d", "image-not-scalar",
    "image-not-finite".
    """
    array, geometry = _read(Path(path))
    limits = np.iinfo(np.int16)
    if array.dtype != np.int16:
        array = np.clip(np.rint(array), limits.min, limits.max).astype(np.int16)
    return Volume(array, geometry)


def read_geometry(path: Path) -> Geometry:
    """The grid of an image, from its header alone.

    Raises DataError: "image-missing", "image-unreadable", "image-not-3d", "image-not-scalar".
    """
    return _geometry(_open(Path(path)))


def read_labels(path: Path) -> tuple[np.ndarray, Geometry]:
    """The values of a mask, whole numbers [z, y, x].

    Raises as `read_image`, and DataError("mask-not-whole").
    """
    array, geometry = _read(Path(path))
    if array.dtype.kind == "f":
        if np.abs(array - np.rint(array)).max() > 1e-3:
            remedy = "give a mask of whole numbers, not probabilities or an interpolated mask"
            raise DataError("mask-not-whole", file=path, remedy=remedy)
        array = np.rint(array).astype(np.int64)
    return array, geometry


def write_mask(path: Path, mask: np.ndarray, geometry: Geometry) -> None:
    """Write `mask` [z, y, x] as uint8 NIfTI, by a temporary file beside it: no half file is ever seen.

    Raises DataError("mask-suffix") unless `path` ends in .nii.gz, GeometryError("shape-mismatch") and
    DataError("mask-unwritable").
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise DataError("mask-suffix", file=path, remedy="name the mask .nii.gz")
    image = to_sitk(mask.astype(np.uint8, copy=False), geometry)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        sitk.WriteImage(image, str(temporary), useCompression=True)
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:
        remedy = "check that the folder exists and has room"
        raise DataError("mask-unwritable", file=path, remedy=remedy) from error
    finally:
        temporary.unlink(missing_ok=True)


def _open(path: Path) -> sitk.ImageFileReader:
    """A reader that has read the header of a 3D grey-value image."""
    if not path.is_file():
        raise DataError("image-missing", file=path, remedy="give an existing NIfTI, NRRD or MetaImage file")
    _, suffix = split_name(path.name)
    if not suffix:
        raise DataError("image-unreadable", file=path, remedy=f"the name must end in {', '.join(SUFFIXES)}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    # Named, since ITK knows most formats by suffixes in small letters only.
    reader.SetImageIO(ITK_READERS.get(suffix, "NiftiImageIO"))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path) from error
    if reader.GetDimension() != 3:
        shape = reader.GetSize()[::-1]
        raise DataError("image-not-3d", file=path, shape=shape, remedy="give one 3D scan a file")
    if reader.GetNumberOfComponents() != 1:
        remedy = "give a grey-value scan, not colours or vectors"
        raise DataError("image-not-scalar", file=path, remedy=remedy)
    return reader


def _read(path: Path) -> tuple[np.ndarray, Geometry]:
    reader = _open(path)
    try:
        if split_name(path.name)[1] in ITK_READERS:
            image = reader.Execute()
            array, geometry = sitk.GetArrayFromImage(image), _geometry(image)
        else:
            geometry = _geometry(reader)
            array = _nifti_voxels(path.read_bytes(), geometry.shape_zyx)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, struct.error, zlib.error) as error:
        raise _unreadable(path) from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError("image-not-finite", file=path, remedy="replace NaN and infinite values")
    return array, geometry


def _nifti_voxels(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The voxels of a NIfTI-1 file, [z, y, x], scaled as its header says (byte offsets: nifti1.h).

    SimpleITK would do it, but it reads a file that was cut short as zeros and NaN as 0, silently.
    """
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    order = "<" if struct.unpack_from("<i", content)[0] == 348 else ">"
    (kind,) = struct.unpack_from(order + "h", content, 70)
    start, slope, intercept = struct.unpack_from(order + "3f", content, 108)
    array = np.frombuffer(content, order + NIFTI_TYPES[kind], math.prod(shape), int(start)).reshape(shape)
    if slope == 0 or (slope, intercept) == (1, 0):
        return array.astype(NIFTI_TYPES[kind])  # a copy in this machine's byte order
    return array * slope + intercept


def _unreadable(path: Path) -> DataError:
    remedy = "open it in a viewer and save it again; its axes must be at right angles"
    return DataError("image-unreadable", file=path, remedy=remedy)


def require_on(array: np.ndarray, geometry: Geometry) -> None:
    """Raises GeometryError("shape-mismatch") unless `array` is on the grid of `geometry`."""
    if array.shape != geometry.shape_zyx:
        remedy = "pass an array on the grid of its geometry"
        raise GeometryError("shape-mismatch", array=array.shape, geometry=geometry.shape_zyx, remedy=remedy)


def to_sitk(array: np.ndarray, geometry: Geometry) -> sitk.Image:
    """Raises GeometryError("shape-mismatch")."""
    require_on(array, geometry)
    image = sitk.GetImageFromArray(array.view(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_lps_mm)
    image.SetDirection(np.ravel(geometry.direction_lps).tolist())
    return image


def _geometry(image: sitk.Image | sitk.ImageFileReader) -> Geometry:
    direction = np.reshape(image.GetDirection(), (3, 3))
    return Geometry(
        image.GetSize()[::-1],
        image.GetSpacing()[::-1],
        image.GetOrigin(),
        (vector(direction[0]), vector(direction[1]), vector(direction[2])),
    )
