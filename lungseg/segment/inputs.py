"""What `predict` takes: a folder of a DICOM series, a NIfTI or an NRRD file, and the case id it gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lungseg.errors import DataError
from lungseg.scan.dicom import read_series
from lungseg.scan.identity import case_id, case_key
from lungseg.scan.volume import SUFFIXES, Volume, read_image


def read_input(path: Path) -> Volume:
    """The scan of a DICOM folder, or of a NIfTI or NRRD file.

    Raises DataError("input-missing") and whatever `dicom.read_series` or `volume.read_image` raise.
    """
    path = Path(path)
    _require(path)
    return read_series(path) if path.is_dir() else read_image(path)


def case_name(path: Path) -> str:
    """The input's own name, without an image suffix."""
    name = Path(path).resolve().name
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix) or "scan"


def case_ids(inputs: Sequence[Path]) -> list[str]:
    """A folder name for each input, before any work is done: the keyed hash of the input's own name, which
    `lungseg prepare pairs` gives the same scan.

    Raises DataError("input-missing"), DataError("input-ambiguous") if two would share a folder, and as
    `case_key`.
    """
    for path in inputs:
        _require(Path(path))
    names = [case_name(path) for path in inputs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        remedy = "rename one, or predict them with different --out"
        raise DataError("input-ambiguous", names=",".join(twice), remedy=remedy)
    key = case_key()
    return [case_id(name, key) for name in names]


def _require(path: Path) -> None:
    if not path.exists():
        raise DataError("input-missing", input=path, remedy="give a DICOM folder, a NIfTI or an NRRD file")
