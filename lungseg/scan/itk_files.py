"""NRRD and MetaImage: SimpleITK reads them, once their header says what it would else assume.

Where a spacing is missing or NaN, it takes 1 mm without a word; an NRRD without an anatomical space it puts
into LPS. Such a header is refused. SimpleITK is imported where it is used: whoever only trains has no need to
wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lungseg.errors import DataError, GeometryError
from lungseg.scan.plausible import Grid

if TYPE_CHECKING:
    import SimpleITK as sitk  # noqa: N813

READERS = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
SPACES = {"left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las"}
HEADER_BYTES = 1 << 16


def read_grid(path: Path) -> Grid:
    """Raises DataError("image-not-3d", "image-not-scalar", "header-ambiguous"),
    GeometryError("orientation-missing", "spacing-implausible"), and RuntimeError where SimpleITK fails.
    """
    reader = _reader(path)
    reader.ReadImageInformation()
    if reader.GetDimension() != 3:
        shape = reader.GetSize()[::-1]
        raise DataError("image-not-3d", file=path, shape=shape, remedy="give one 3D scan a file")
    if reader.GetNumberOfComponents() != 1:
        remedy = "give a grey-value scan, not colours or vectors"
        raise DataError("image-not-scalar", file=path, remedy=remedy)
    _require_stated(path)
    axes = np.reshape(reader.GetDirection(), (3, 3))
    return Grid(reader.GetSize()[::-1], np.array(reader.GetSpacing()), axes, np.array(reader.GetOrigin()))


def read_voxels(path: Path) -> np.ndarray:
    """The values [z, y, x]. Raises RuntimeError where SimpleITK fails, also at a file that was cut short."""
    import SimpleITK as sitk  # noqa: N813

    array: np.ndarray = sitk.GetArrayFromImage(_reader(path).Execute())
    return array


def _reader(path: Path) -> sitk.ImageFileReader:
    import SimpleITK as sitk  # noqa: N813

    reader = sitk.ImageFileReader()
    # Named, since ITK knows a format by its suffix in small letters only.
    reader.SetImageIO(READERS[path.suffix.lower()])
    reader.SetFileName(itk_name(path))
    return reader


def itk_name(path: Path) -> str:
    """The path as SimpleITK takes it: one that is no text would end the whole process in C++.

    Raises DataError("path-not-text").
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        remedy = "rename it, or the folder that is so called, with UTF-8 letters"
        raise DataError("path-not-text", file=path, remedy=remedy) from error
    return str(path)


def _require_stated(path: Path) -> None:
    """Refuses a header that leaves out, or says in words unknown to SimpleITK, where its voxels lie."""
    fields = _text_header(path)
    if path.suffix.lower() != ".nrrd":
        if not fields.keys() & {"elementspacing", "elementsize"}:
            remedy = "add the field to the header, in millimetres"
            raise GeometryError("spacing-implausible", file=path, fields="ElementSpacing", remedy=remedy)
        return
    if fields.get("space", "").lower() not in SPACES or "space directions" not in fields:
        remedy = "convert the scan again, with `space: left-posterior-superior` and `space directions`"
        raise GeometryError("orientation-missing", file=path, fields="space, space directions", remedy=remedy)
    if "none" in fields["space directions"]:
        remedy = "give each of the three axes its direction"
        raise DataError("header-ambiguous", file=path, fields="space directions", remedy=remedy)
    if set(fields.get("space units", "").replace('"', " ").split()) - {"mm"}:
        remedy = "convert the scan again, with its directions in millimetres"
        raise DataError("header-ambiguous", file=path, fields="space units", remedy=remedy)


def _text_header(path: Path) -> dict[str, str]:
    """The header's fields, keys in small letters: lines `key: value` (NRRD) or `key = value` (MetaImage)."""
    with path.open("rb") as file:
        lines = file.read(HEADER_BYTES).decode("latin-1").splitlines()
    separator = ":" if path.suffix.lower() == ".nrrd" else "="
    fields: dict[str, str] = {}
    for line in lines:
        key, found, value = line.partition(separator)
        if not line.strip() or "elementdatafile" in fields:
            break  # here the voxels begin
        if found:
            fields[key.strip().lower()] = value.strip()
    return fields
