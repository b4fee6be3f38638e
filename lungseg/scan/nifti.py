"""NIfTI-1 and NIfTI-2: the header fields that say what a voxel is and where it lies.

SimpleITK reads neither NIfTI-2 nor a file that was cut short as what it is: the missing voxels become 0. So
this reader follows the standard (nifti1.h, nifti2.h), and refuses what two readers understand differently:

  both forms set and different               "header-ambiguous": nibabel takes the sform, ITK often the qform
  sform and pixdim differ in spacing         "header-ambiguous": nibabel takes the sform's, ITK pixdim's
  no form set                                "orientation-missing": nibabel mirrors the patient, ITK does not
  scl_inter without a scl_slope              "header-ambiguous": nibabel ignores it, ITK adds it
  scl_inter not finite, a quaternion > 1     "header-ambiguous": nibabel refuses, ITK guesses
  vox_offset within the header               "header-ambiguous": ITK takes the header for voxels
  pixdim 0, negative or not finite           "spacing-implausible": ITK makes 1 mm of 0
  scl_slope 0 or not finite, scl_inter 0 or NaN   read without scaling, as all do
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from lungseg.errors import DataError, GeometryError
from lungseg.scan.plausible import Grid, at_right_angles, require_spacing

SUFFIXES = (".nii.gz", ".nii")
GZIP = b"\x1f\x8b"
TYPES = {2: "u1", 4: "i2", 8: "i4", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
TYPES |= {16: "f4", 64: "f8"}
COLOURS = {32, 128, 1792, 2304}  # and complex numbers
UNIT_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # unknown, metres, millimetres, microns
SAME_SPACING = 0.01
SAME_FORM = 0.1  # of the smallest spacing

NAMES = ("dim", "datatype", "pixdim", "vox_offset", "scl_slope", "scl_inter", "xyzt_units", "qform_code",
         "sform_code", "quatern", "qoffset", "srow", "magic")  # fmt: skip
FORMATS_1 = ("8i2", "i2", "8f4", "f4", "f4", "f4", "u1", "i2", "i2", "3f4", "3f4", "(3,4)f4", "S3")
OFFSETS_1 = (40, 70, 76, 108, 112, 116, 123, 252, 254, 256, 268, 280, 344)
FORMATS_2 = ("8i8", "i2", "8f8", "i8", "f8", "f8", "i4", "i4", "i4", "3f8", "3f8", "(3,4)f8", "S3")
OFFSETS_2 = (16, 12, 104, 168, 176, 184, 500, 344, 348, 352, 376, 400, 4)
LAYOUTS = {
    348: np.dtype({"names": NAMES, "formats": FORMATS_1, "offsets": OFFSETS_1, "itemsize": 348}),
    540: np.dtype({"names": NAMES, "formats": FORMATS_2, "offsets": OFFSETS_2, "itemsize": 540}),
}


def read_grid(path: Path) -> Grid:
    """Raises DataError("image-unreadable", "image-not-3d", "image-not-scalar", "header-ambiguous") and
    GeometryError("orientation-missing", "gantry-tilt", "spacing-implausible").
    """
    opened = gzip.open if _is_gzip(path) else open
    with opened(path, "rb") as file:
        header = _header(file.read(max(LAYOUTS)), path)
    matrix = _lps(header, path)
    spacing_mm = np.linalg.norm(matrix[:3, :3], axis=0)
    return Grid(_shape(header, path), spacing_mm, matrix[:3, :3] / spacing_mm, matrix[:3, 3])


def read_voxels(path: Path) -> np.ndarray:
    """The values [z, y, x], scaled as the header says. Raises as `read_grid`, and ValueError if cut short."""
    content = path.read_bytes()
    if content.startswith(GZIP):
        content = gzip.decompress(content)
    header = _header(content[: max(LAYOUTS)], path)
    shape, kind = _shape(header, path), TYPES.get(int(header["datatype"]))
    if kind is None:
        raise _unreadable(path, f"voxels of type {header['datatype']}")
    first = int(header["vox_offset"])
    if first < header.dtype.itemsize + 4:
        raise _ambiguous(path, "vox_offset", f"voxels begin at byte {first}, within the header")
    stored = header.dtype["dim"].base.byteorder + kind
    array = np.frombuffer(content, stored, math.prod(shape), first).reshape(shape)
    scale = _scale(header, path)
    return array * scale[0] + scale[1] if scale else array.astype(kind)  # in this machine's byte order


def encode(array: np.ndarray, lps: np.ndarray, scale: tuple[float, float] = (1, 0)) -> bytes:
    """A NIfTI-1 file of uint8 `array` [z, y, x]: `lps` [4, 4] goes from indices (x, y, z, 1) to LPS
    millimetres, `scale` is (slope, intercept) of the values."""
    header = np.zeros(1, LAYOUTS[348])
    header["dim"] = [3, *array.shape[::-1], 1, 1, 1, 1]
    header["datatype"], header["xyzt_units"], header["vox_offset"] = 2, 2, 352
    header["pixdim"][0, :4] = [1, *np.linalg.norm(lps[:3, :3], axis=0)]
    header["scl_slope"], header["scl_inter"] = scale
    header["sform_code"], header["srow"] = 1, (np.diag([-1, -1, 1, 1]) @ lps)[:3]
    header["magic"] = b"n+1"
    content = bytearray(header.tobytes() + bytes(4))
    content[:4], content[72:74] = (348).to_bytes(4, "little"), (8).to_bytes(2, "little")  # bits a voxel
    return bytes(content) + array.tobytes()


def _scale(header: np.void, path: Path) -> tuple[float, float] | None:
    """Slope and intercept, where there is something to scale."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    none = slope == 0 or not math.isfinite(slope)
    understood = intercept == 0 or math.isnan(intercept) if none else math.isfinite(intercept)
    if not understood:
        raise _ambiguous(path, "scl_slope, scl_inter", f"slope {slope:g}, intercept {intercept:g}")
    return None if none or (slope, intercept) == (1, 0) else (slope, intercept)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == GZIP


def _header(content: bytes, path: Path) -> np.void:
    if content.startswith(GZIP):
        raise _unreadable(path, "gzip inside gzip", "unpack it once with gunzip")
    for size, layout in LAYOUTS.items():
        for order in ("<", ">"):
            if content[:4] == np.array(size, order + "i4").tobytes() and len(content) >= size:
                header: np.void = np.frombuffer(content, layout.newbyteorder(order), 1)[0]
                if header["magic"].startswith(b"n+"):
                    return header
    raise _unreadable(path, "no header of NIfTI-1 or NIfTI-2 in one file")


def _shape(header: np.void, path: Path) -> tuple[int, ...]:
    rank = int(header["dim"][0])
    sides = header["dim"][1 : rank + 1].tolist()
    longer = [side for side in sides[3:] if side > 1]  # a fourth axis of length 1 is often written
    if header["datatype"] in COLOURS or (len(sides) == 5 and sides[3] <= 1 < sides[4]):
        remedy = "give a grey-value scan, not colours or vectors"
        raise DataError("image-not-scalar", file=path, remedy=remedy)
    if not 3 <= rank <= 7 or longer:
        raise DataError("image-not-3d", file=path, shape=sides[::-1], remedy="give one 3D scan a file")
    if min(sides[:3]) < 1:
        raise _unreadable(path, f"dim of {sides[:3]}")
    return tuple(sides[2::-1])


def _lps(header: np.void, path: Path) -> np.ndarray:
    """The matrix [4, 4] from indices (x, y, z, 1) to LPS millimetres."""
    pixdim = header["pixdim"][1:4].astype(np.float64)
    unit = UNIT_MM.get(int(header["xyzt_units"]) & 7)
    if unit is None:
        raise _ambiguous(path, "xyzt_units", "neither metres nor millimetres nor microns")
    require_spacing(pixdim * unit, file=path, fields="pixdim")
    forms = [_sform(header, pixdim, path)] if header["sform_code"] > 0 else []
    forms += [_qform(header, pixdim, path)] if header["qform_code"] > 0 else []
    if not forms:
        remedy = "convert the scan again from DICOM, or save it with its affine as sform"
        fields = "qform_code, sform_code"
        raise GeometryError("orientation-missing", file=path, fields=fields, remedy=remedy)
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*_shape(header, path)[::-1], 1]
    apart = float(np.abs((forms[0] - forms[-1]) @ corners.T).max())
    if not apart <= SAME_FORM * pixdim.min():
        message = f"the two put a voxel {apart * unit:.3g} mm apart"
        raise _ambiguous(path, "qform_code, sform_code", message, "set the code of the wrong form to 0")
    return np.diag([-unit, -unit, unit, 1]) @ forms[0]


def _sform(header: np.void, pixdim: np.ndarray, path: Path) -> np.ndarray:
    """The matrix of nifti1.h's method 3."""
    fields = "srow_x, srow_y, srow_z"
    matrix = np.vstack([header["srow"].astype(np.float64), (0, 0, 0, 1)])
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    at_right_angles(matrix[:3, :3] / np.maximum(spacing, 1e-30), file=path, fields=fields)
    if not np.allclose(spacing, pixdim, rtol=SAME_SPACING, atol=0):
        message = f"spacing {_shown(spacing)} by the sform, {_shown(pixdim)} by pixdim"
        raise _ambiguous(path, f"{fields}, pixdim", message)
    return matrix


def _qform(header: np.void, pixdim: np.ndarray, path: Path) -> np.ndarray:
    """The matrix of nifti1.h's method 2."""
    b, c, d = header["quatern"].astype(np.float64)
    rest = 1 - (b * b + c * c + d * d)
    if not rest > -1e-5:
        raise _ambiguous(path, "quatern_b, quatern_c, quatern_d", "longer than 1")
    a = math.sqrt(max(rest, 0))
    axes = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    flip = -1 if header["pixdim"][0] < 0 else 1
    matrix = np.eye(4)
    matrix[:3, :3] = axes * pixdim * (1, 1, flip)
    matrix[:3, 3] = header["qoffset"]
    return matrix


def _shown(spacing: np.ndarray) -> str:
    return " x ".join(f"{one:.4g}" for one in spacing)


def _ambiguous(
    path: Path, fields: str, message: str, remedy: str = "convert the scan again, or correct these fields"
) -> DataError:
    return DataError("header-ambiguous", file=path, fields=fields, message=message, remedy=remedy)


def _unreadable(path: Path, message: str, remedy: str = "convert or copy the scan again") -> DataError:
    return DataError("image-unreadable", file=path, message=message, remedy=remedy)
