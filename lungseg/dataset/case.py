"""What every source of training data hands to `prepare`: one case a scan, loaded where it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lungseg.errors import DataError
from lungseg.scan.volume import Volume


@dataclass(frozen=True)
class Nodule:
    """A nodule of the reference: `diameter_mm` is that of a ball of the same volume, `reader_dice` the mean
    over all pairs of its readers where their outlines are known."""

    nodule_id: str
    centre_lps_mm: tuple[float, float, float]
    diameter_mm: float
    readers: int
    reader_dice: float | None = None


@dataclass(frozen=True)
class Exclusion:
    """A scan that is here and is left out: `code` is stable, `reason` for people, and names no file. The
    protocol leaves it out, or it is `broken`."""

    case_id: str
    code: str
    reason: str
    broken: bool = False


@dataclass(frozen=True)
class LabelledScan:
    """A scan on its own grid; `mask` (1 nodule) and `ignore` (1 neither target nor false positive)
    are uint8 [z, y, x] on the grid of `volume`."""

    volume: Volume
    mask: np.ndarray
    ignore: np.ndarray
    nodules: tuple[Nodule, ...]


@dataclass(frozen=True)
class ScanFacts:
    """What a data set says of a scan as it was read, before it was resampled; `not_hu` as in `Volume`."""

    spacing_mm: tuple[float, float, float]
    shape_zyx: tuple[int, int, int]
    nodules: tuple[Nodule, ...]
    not_hu: str = ""

    @staticmethod
    def of(scan: LabelledScan) -> ScanFacts:
        geometry = scan.volume.geometry
        return ScanFacts(geometry.spacing_mm, geometry.shape_zyx, scan.nodules, scan.volume.not_hu)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> ScanFacts:
        nodules = (Nodule(**{**one, "centre_lps_mm": tuple(one["centre_lps_mm"])}) for one in tree["nodules"])
        grid = tuple(tree["spacing_mm"]), tuple(tree["shape_zyx"])
        return ScanFacts(*grid, tuple(nodules), tree.get("not_hu", ""))


class Case(Protocol):
    """A picklable handle. `case_id` names the scan wherever anything is written; it is a keyed hash, or
    public. `patient_id` only decides the split and is never written anywhere; `patients_by` says for people
    how patients were told apart, the same for all cases of a source. `stamp` changes when the scan's files
    do: what was kept of it is then not used."""

    @property
    def case_id(self) -> str: ...

    @property
    def patient_id(self) -> str: ...

    @property
    def patients_by(self) -> str: ...

    def stamp(self) -> str: ...

    def load(self) -> LabelledScan: ...


def stamp_of(files: Iterable[Path]) -> str:
    """A digest of the files' sizes and times of change, and of no name, which may be a patient's.

    Raises DataError("scan-unreachable").
    """
    try:
        seen = sorted((status.st_size, status.st_mtime_ns) for status in (file.stat() for file in files))
    except OSError as error:
        remedy = "put the scan back, or mount its folder under this path on every node"
        raise DataError("scan-unreachable", file=error.filename, remedy=remedy) from error
    return hashlib.sha256(repr(seen).encode()).hexdigest()


IGNORE = 255
"""Value of mask voxels that are neither target nor background."""
