"""What every source of training data hands to `prepare`: one case a scan, loaded where it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lungseg.errors import DataError
from lungseg.scan.volume import Geometry, Volume, vector


@dataclass(frozen=True)
class Nodule:
    """A nodule of the reference: `equivalent_diameter_mm` is that of a ball of the same volume.

    Where readers' outlines are known, `reader_dice` is the mean over all pairs of readers, and
    `mean_reader_diameter_mm` the mean of their longest axial diameters, which LUNA16 uses. `texture` is the
    mean rating from 1 (ground glass) to 5 (solid), `subtlety` that from 1 (extremely subtle) to 5 (obvious),
    `calcification` the most frequent kind from 1 (popcorn) to 6 (absent). A region to ignore is described in
    the same way.
    """

    nodule_id: str
    centre_lps_mm: tuple[float, float, float]
    equivalent_diameter_mm: float
    readers: int
    reader_dice: float | None = None
    mean_reader_diameter_mm: float | None = None
    texture: float | None = None
    subtlety: float | None = None
    calcification: int | None = None

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Nodule:
        return Nodule(**{**tree, "centre_lps_mm": vector(tree["centre_lps_mm"])})


@dataclass(frozen=True)
class Outlines:
    """What each reader enclosed of one thing: bool [reader, z, y, x] of that part of the scan's grid whose
    first voxel is `first_zyx`. Readers are anonymous: the first need not be the same person elsewhere."""

    first_zyx: tuple[int, int, int]
    masks: np.ndarray


@dataclass(frozen=True)
class Truth:
    """Whose each voxel of a grid is, and what is known of each: `numbers` as in `LabelledScan`,
    `nodules[n - 1]` is nodule n, `regions[n - 1]` the n-th region to ignore. `outlines` are by number, and
    empty where no readers are known."""

    geometry: Geometry
    numbers: np.ndarray
    nodules: tuple[Nodule, ...]
    regions: tuple[Nodule, ...] = ()
    outlines: Mapping[int, Outlines] = field(default_factory=dict)


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
    """A scan on its own grid, and whose each voxel is: `numbers` int16 [z, y, x] on the grid of `volume` is n
    in nodule number n (`nodules[n - 1]`), -n in the n-th region that is neither target nor false positive,
    and 0 in all else. So nodules that touch stay two. `regions` and `outlines` as in `Truth`."""

    volume: Volume
    numbers: np.ndarray
    nodules: tuple[Nodule, ...]
    regions: tuple[Nodule, ...] = ()
    outlines: Mapping[int, Outlines] = field(default_factory=dict)

    @property
    def truth(self) -> Truth:
        return Truth(self.volume.geometry, self.numbers, self.nodules, self.regions, self.outlines)

    @property
    def mask(self) -> np.ndarray:
        """uint8 [z, y, x], 1 in any nodule."""
        return (self.numbers > 0).view(np.uint8)

    @property
    def ignore(self) -> np.ndarray:
        """uint8 [z, y, x], 1 in any region to ignore."""
        return (self.numbers < 0).view(np.uint8)

    def sha256(self) -> str:
        """Of all that training takes from the scan: its values, its grid, its numbers."""
        geometry = repr(self.volume.geometry).encode()
        parts = (geometry, self.volume.volume_hu, self.numbers)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class ScanFacts:
    """What a data set says of a scan as it was read, before it was resampled; `sha256` is that of the
    labelled scan, by which a changed mask or scan is noticed, `not_hu` as in `Volume`."""

    spacing_mm: tuple[float, float, float]
    shape_zyx: tuple[int, int, int]
    nodules: tuple[Nodule, ...]
    sha256: str
    not_hu: str = ""

    @staticmethod
    def of(scan: LabelledScan) -> ScanFacts:
        geometry = scan.volume.geometry
        facts = geometry.spacing_mm, geometry.shape_zyx, scan.nodules
        return ScanFacts(*facts, scan.sha256(), scan.volume.not_hu)

    @staticmethod
    def from_json(tree: dict[str, Any]) -> ScanFacts:
        nodules = tuple(map(Nodule.from_json, tree["nodules"]))
        grid = tuple(tree["spacing_mm"]), tuple(tree["shape_zyx"])
        return ScanFacts(*grid, nodules, tree["sha256"], tree.get("not_hu", ""))


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
