"""A scan as HU array and geometry: reading of NIfTI, NRRD and MetaImage, writing of NIfTI.

Arrays are [z, y, x]; indices, shapes and spacings are (z, y, x); patient coordinates are (x, y, z) in
DICOM's LPS millimetres (x to the patient's left, y to the back, z to the head). An index names the
centre of a voxel, so a volume reaches half a voxel beyond its first and last centres.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from lungseg.errors import DataError, GeometryError
from lungseg.scan import itk_files, nifti
from lungseg.scan.plausible import at_right_angles, not_hu, require_spacing

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

AIR_HU = -1024
SUFFIXES = (*nifti.SUFFIXES, *itk_files.READERS)
SHOWN = ", ".join(SUFFIXES)
# How a file begins that stands for one kept elsewhere: by git-lfs, or by an unlocked git-annex.
POINTERS = (b"version https://git-lfs", b"/annex/objects/")
BROKEN = (RuntimeError, OSError, EOFError, ValueError, struct.error, zlib.error)

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
    """`volume_hu` is int16 [z, y, x] on the grid of `geometry`. `not_hu` says why its values are probably no
    HU, for whoever read them from a file; it is "" where they may be."""

    volume_hu: np.ndarray
    geometry: Geometry
    not_hu: str = ""


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

    Raises as `read_geometry`, and DataError("image-not-finite").
    """
    array, geometry = _read(Path(path))
    limits = np.iinfo(np.int16)
    if array.dtype != np.int16:
        array = np.clip(np.rint(array), limits.min, limits.max).astype(np.int16)
    return Volume(array, geometry, not_hu(array))


def read_geometry(path: Path) -> Geometry:
    """The grid of an image, from its header alone.

    Raises DataError: "image-missing", "image-unreadable", "image-not-3d", "image-not-scalar",
    "header-ambiguous". Raises GeometryError: "orientation-missing", "gantry-tilt", "spacing-implausible".
    """
    path = Path(path)
    try:
        grid = _format(path).read_grid(path)
    except BROKEN as error:
        raise _unreadable(path) from error
    require_spacing(grid.spacing_xyz_mm[::-1], file=path)
    rows = at_right_angles(grid.axes, file=path)
    depth, height, width = grid.shape_zyx
    return Geometry(
        (depth, height, width),
        vector(grid.spacing_xyz_mm[::-1]),
        vector(grid.origin_lps_mm),
        (vector(rows[0]), vector(rows[1]), vector(rows[2])),
    )


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
    """Write `mask` [z, y, x] as uint8. Raises as `write_nifti`."""
    write_nifti(path, mask.astype(np.uint8, copy=False), geometry)


def write_nifti(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write `array` [z, y, x] as NIfTI, by a temporary file beside it: no half file is ever seen.

    Raises DataError("mask-suffix") unless `path` ends in .nii.gz, GeometryError("shape-mismatch") and
    DataError("mask-unwritable").
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise DataError("mask-suffix", file=path, remedy="name the mask .nii.gz")
    import SimpleITK as sitk  # noqa: N813

    image = to_sitk(array, geometry)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        sitk.WriteImage(image, itk_files.itk_name(temporary), useCompression=True)
        os.replace(temporary, path)
    except (RuntimeError, OSError) as error:
        remedy = "check that the folder exists and has room"
        raise DataError("mask-unwritable", file=path, remedy=remedy) from error
    finally:
        temporary.unlink(missing_ok=True)


def _format(path: Path) -> ModuleType:
    """The module that reads such a file. Raises DataError("image-missing" or "image-unreadable")."""
    if not path.is_file():
        link = path.is_symlink() and f"a link to {os.readlink(path)}, which is not here"
        remedy = "fetch its content (git annex get, or a mount)" if link else f"give a file of {SHOWN}"
        raise DataError("image-missing", file=path, message=link or "", remedy=remedy)
    _, suffix = split_name(path.name)
    if not suffix:
        raise DataError("image-unreadable", file=path, remedy=f"the name must end in {SHOWN}")
    with path.open("rb") as file:
        first = file.read(128)
    if first.startswith(POINTERS):
        remedy = "fetch the file itself: git lfs pull, or git annex get"
        raise DataError("image-unreadable", file=path, message="only a pointer to a file", remedy=remedy)
    return nifti if suffix in nifti.SUFFIXES else itk_files


def _read(path: Path) -> tuple[np.ndarray, Geometry]:
    geometry = read_geometry(path)
    try:
        array = _format(path).read_voxels(path)
    except BROKEN as error:
        raise _unreadable(path) from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError("image-not-finite", file=path, remedy="replace NaN and infinite values")
    return array, geometry


def _unreadable(path: Path) -> DataError:
    return DataError(
        "image-unreadable", file=path, remedy="fetch it again, or open it in a viewer and save it"
    )


def require_on(array: np.ndarray, geometry: Geometry) -> None:
    """Raises GeometryError("shape-mismatch") unless `array` is on the grid of `geometry`."""
    if array.shape != geometry.shape_zyx:
        remedy = "pass an array on the grid of its geometry"
        raise GeometryError("shape-mismatch", array=array.shape, geometry=geometry.shape_zyx, remedy=remedy)


def to_sitk(array: np.ndarray, geometry: Geometry) -> sitk.Image:
    """Raises GeometryError("shape-mismatch")."""
    import SimpleITK as sitk  # noqa: N813

    require_on(array, geometry)
    image = sitk.GetImageFromArray(array.view(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.origin_lps_mm)
    image.SetDirection(np.ravel(geometry.direction_lps).tolist())
    return image
