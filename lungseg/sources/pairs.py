"""Any folder of scans and masks as cases, in any layout of `lungseg.sources.layouts`.

A mask holds 0, the target's label and perhaps ignore's. The target is what `data.pairs.label` says; else the
one label that dataset.json names; else 1. Without that setting a mask with any other label is refused: which
of several structures is the nodule must not be guessed. What ignore covers is neither target nor background:
the label that dataset.json names so, and `data.pairs.ignore_label`.

A case's name is its file's stem, its id the keyed hash of that (`lungseg.scan.identity`). Its patient, who
must not be in two splits, comes from an optional `patients.csv` (columns name, patient) in the folder.
Without one it is the name up to its last `_`, as long as a digit remains: `LIDC-IDRI-0001_nod1` belongs to
`LIDC-IDRI-0001`, but `lung_001` to itself.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cc3d
import numpy as np

from lungseg.config import PairsConfig
from lungseg.dataset.case import LabelledScan, Nodule, stamp_of
from lungseg.dataset.splits import csv_rows, spelled
from lungseg.errors import DataError, GeometryError
from lungseg.scan.identity import as_read, case_id, case_key
from lungseg.scan.volume import Geometry, bounding_box, read_geometry, read_image, read_labels, vector
from lungseg.sources.layouts import read_layout
from lungseg.telemetry import log

SAME_PLACE_MM = 0.01
BY_NAME = "by name; patients.csv changes it"
BY_TABLE = "by patients.csv"


@dataclass(frozen=True)
class Labels:
    """What values of a mask mean. `target` None: every label but ignore's; `strict`: no others may be."""

    names: dict[str, int]
    target: frozenset[int] | None
    ignore: frozenset[int]
    strict: bool

    def show(self, values: Iterable[int]) -> str:
        known = {value: name for name, value in self.names.items()}
        return ", ".join(f"{value} ({known[value]})" if value in known else str(value) for value in values)


@dataclass(frozen=True)
class PairCase:
    image: Path
    mask: Path
    case_id: str
    patient_id: str
    patients_by: str
    labels: Labels

    def stamp(self) -> str:
        return stamp_of([self.image, self.mask])

    def load(self) -> LabelledScan:
        """The scan and its mask, whose nodules are as `_nodules` tells them apart.

        Raises as `read_image` and `read_labels`, DataError("labels-several"), GeometryError("grid-mismatch").
        """
        _check_grids(self.image, self.mask)
        values, geometry = read_labels(self.mask)
        target, ignore = _divide(values, self.labels, self.mask)
        numbers, nodules = _nodules(target, geometry, by_value=self.labels.target is None)
        ignored, regions = _nodules(ignore, geometry)
        return LabelledScan(read_image(self.image), numbers - ignored, nodules, regions)


def find_cases(folder: Path, config: PairsConfig, check: bool = True) -> list[PairCase]:
    """The pairs of `folder` in the order of their names; voxels are not read, headers only for a `check`.

    Raises DataError: as `read_layout`, "labels-several", "label-unknown", "patients-invalid",
    "patients-incomplete", and as `read_geometry`; GeometryError("grid-mismatch"); as `case_key`.
    """
    folder = Path(folder)
    layout = read_layout(folder)
    if layout.left_out:
        log("data").warning("no images, and left out: %s", ", ".join(map(str, layout.left_out)))
    labels = _meaning(layout.labels, config, folder / "dataset.json")
    patients = _patients(folder / "patients.csv")
    key = case_key()
    cases = []
    for stem in sorted(layout.images):
        image, mask = layout.images[stem], layout.masks[stem]
        if check:
            _check_grids(image, mask)
        if patients and stem not in patients:
            raise DataError(
                "patients-incomplete", case=stem, remedy="add a row for each case to patients.csv"
            )
        patient, by = (patients[stem], BY_TABLE) if patients else (patient_of(stem), BY_NAME)
        cases.append(PairCase(image, mask, case_id(stem, key), patient, by, labels))
    return cases


def patient_of(stem: str) -> str:
    """The patient of a case without `patients.csv`, by the rule at the head of this module."""
    before, _, _ = stem.rpartition("_")
    return before if any(letter.isdigit() for letter in before) else stem


def _meaning(names: dict[str, int], config: PairsConfig, table: Path) -> Labels:
    ignore = {value for name, value in names.items() if name.lower() == "ignore"} | {config.ignore_label}
    structures = {name: value for name, value in names.items() if value not in ignore}
    shown = ", ".join(f"{value} ({name})" for name, value in structures.items())
    if config.label is None:
        if len(structures) > 1:
            remedy = "set data.pairs.label to the nodule's, or to a list of them"
            raise DataError("labels-several", file=table, labels=shown, remedy=remedy)
        return Labels(names, frozenset(structures.values()) or frozenset({1}), frozenset(ignore), strict=True)
    if config.label == "any":
        return Labels(names, None, frozenset(ignore), strict=False)
    target = frozenset([config.label] if isinstance(config.label, int) else config.label)
    unknown = sorted(target - set(names.values()))
    if names and unknown:
        raise DataError("label-unknown", file=table, label=unknown[0], remedy=f"choose of {shown}")
    return Labels(names, target, frozenset(ignore) - target, strict=False)


def _divide(values: np.ndarray, labels: Labels, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The target's values, 0 in all else, and ignore regions, uint8 with 1 where they are."""
    present = {int(value) for value in np.unique(values)} - {0}
    ignored = present & labels.ignore
    target = present - ignored if labels.target is None else present & labels.target
    # A mask of 0 and 255 is a binary one more often than one of nothing but ignore regions.
    doubtful = ignored - set(labels.names.values()) if not target else set()
    others = doubtful | (present - target - ignored)
    if labels.strict and others:
        remedy = "set data.pairs.label to the nodule's label, or to a list; then others are background"
        raise DataError("labels-several", file=file, labels=labels.show(sorted(present)), remedy=remedy)
    wanted, ignore = (np.isin(values, sorted(chosen)) for chosen in (target, ignored))
    return np.where(wanted, values, 0), ignore.view(np.uint8)


def _patients(table: Path) -> dict[str, str]:
    if not table.exists():
        return {}
    try:
        rows = csv_rows(table.read_text(encoding="utf-8-sig"), ("name", "patient"))
    except (OSError, ValueError, LookupError, csv.Error) as error:
        raise _invalid(table) from error
    first: dict[str, str] = {}  # "Anna" and "anna " are one patient, who must not be in two splits
    patients = {as_read(name): first.setdefault(spelled(patient), patient) for name, patient in rows}
    if len(patients) < len(rows) or not rows:
        raise _invalid(table)
    return patients


def _invalid(table: Path) -> DataError:
    remedy = "write UTF-8 text with the columns name,patient and one full row a scan"
    return DataError("patients-invalid", file=table, remedy=remedy)


def _check_grids(image: Path, mask: Path) -> None:
    ours, theirs = read_geometry(image), read_geometry(mask)
    if ours.shape_zyx == theirs.shape_zyx:
        far = np.diag(ours.shape_zyx)  # the origin and the ends of the three axes fix a grid
        points = np.vstack([np.zeros(3), far])
        if np.abs(ours.to_lps_mm(points) - theirs.to_lps_mm(points)).max() < SAME_PLACE_MM:
            return
    raise GeometryError(
        "grid-mismatch",
        file=image,
        image=ours,
        mask=theirs,
        tolerance_mm=SAME_PLACE_MM,
        remedy="resample the mask onto the image's grid",
    )


def _nodules(
    target: np.ndarray, geometry: Geometry, by_value: bool = False
) -> tuple[np.ndarray, tuple[Nodule, ...]]:
    """The nodules of a mask: their numbers, int16 [z, y, x], and what they are.

    Each 26-connected component of one value is one: nodules of different values may touch. With `by_value` a
    mask of several values is a label map, in which each value is a nodule, whatever parts it has. Where there
    are several values a nodule's id tells its own.
    """
    numbers = np.zeros(target.shape, np.int16)
    box = bounding_box(target)
    if not box:
        return numbers, ()
    values, part = target[box], geometry.part(box)
    present = np.unique(values[values != 0])
    labels: np.ndarray
    if by_value and present.size > 1:
        labels = np.where(values != 0, np.searchsorted(present, values) + 1, 0)
    else:
        labels = cc3d.connected_components(values, connectivity=26)
    numbers[box] = labels
    statistics = cc3d.statistics(labels.astype(np.uint32, copy=False))
    volumes_mm3 = statistics["voxel_counts"] * math.prod(geometry.spacing_mm)
    value_of = np.zeros(len(volumes_mm3), values.dtype)
    value_of[labels] = values
    parts_of = Counter(value_of.tolist())

    def name(label: int) -> str:
        if present.size == 1:
            return str(label)
        return f"{value_of[label]}" + (f".{label}" if parts_of[value_of[label]] > 1 else "")

    return numbers, tuple(
        Nodule(
            nodule_id=name(label),
            centre_lps_mm=vector(part.to_lps_mm(statistics["centroids"][label])),
            equivalent_diameter_mm=math.cbrt(6 / math.pi * float(volumes_mm3[label])),
            readers=0,
        )
        for label in range(1, len(volumes_mm3))
    )
