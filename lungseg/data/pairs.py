"""Any folder of scans and masks as cases: `images/` and `masks/` of NIfTI or NRRD with matching names.

A case is named by its file's stem. Its patient, who must not be in two splits, comes from an optional
`patients.csv` (columns name, patient) in the folder. Without one it is the stem up to its last `_`, as
long as a digit remains: `LIDC-IDRI-0001_nod1` belongs to `LIDC-IDRI-0001`, but `lung_001` to itself.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import cc3d
import numpy as np

from lungseg.data.case import LabelledScan, Nodule
from lungseg.data.volume import SUFFIXES, Geometry, read_geometry, read_image, read_mask, vector
from lungseg.errors import DataError, GeometryError

SAME_PLACE_MM = 0.01


@dataclass(frozen=True)
class PairCase:
    image: Path
    mask: Path
    case_id: str
    patient_id: str

    def load(self) -> LabelledScan:
        """The scan and its mask; each 26-connected component of the mask is a nodule, nothing is ignored.

        Raises as `read_image`.
        """
        mask, geometry = read_mask(self.mask)
        return LabelledScan(read_image(self.image), mask, np.zeros_like(mask), _nodules(mask, geometry))


def find_cases(folder: Path) -> list[PairCase]:
    """The pairs of `folder` in the order of their names; headers are read, voxels are not.

    Raises DataError: "folder-missing", "pairs-none", "pair-unmatched", "pair-ambiguous",
    "patients-invalid", "patients-incomplete", and as `read_geometry`; GeometryError("grid-mismatch").
    """
    folder = Path(folder)
    images, masks = _by_stem(folder / "images"), _by_stem(folder / "masks")
    if not images and not masks:
        raise DataError(
            "pairs-none", folder=folder, remedy=f"put {', '.join(SUFFIXES)} files in images/ and masks/"
        )
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        file = (images | masks)[alone[0]].relative_to(folder)
        message = f"{len(alone)} of {len(images | masks)} names have no partner"
        raise DataError("pair-unmatched", message=message, file=file, remedy="name image and mask alike")
    patients = _patients(folder / "patients.csv")
    cases = []
    for stem in sorted(images):
        _check_grids(images[stem], masks[stem])
        if patients and stem not in patients:
            raise DataError(
                "patients-incomplete", case=stem, remedy="add a row for each case to patients.csv"
            )
        cases.append(PairCase(images[stem], masks[stem], stem, patients.get(stem) or patient_of(stem)))
    return cases


def patient_of(stem: str) -> str:
    """The patient of a case without `patients.csv`, by the rule at the head of this module."""
    before, _, _ = stem.rpartition("_")
    return before if any(letter.isdigit() for letter in before) else stem


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError("folder-missing", folder=folder, remedy="give a folder with images/ and masks/ in it")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((one for one in SUFFIXES if path.name.endswith(one)), None)
        if suffix is None or path.name.startswith("."):
            continue
        stem = path.name.removesuffix(suffix)
        if stem in files:
            raise DataError(
                "pair-ambiguous", file=path, other=files[stem].name, remedy="keep one file a case"
            )
        files[stem] = path
    return files


def _patients(table: Path) -> dict[str, str]:
    if not table.exists():
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _invalid(table) from error
    if not rows or not all(row.get("name") and row.get("patient") for row in rows):
        raise _invalid(table)
    return {row["name"]: row["patient"] for row in rows}


def _invalid(table: Path) -> DataError:
    remedy = "write UTF-8 text with the columns name,patient and fill each row"
    return DataError("patients-invalid", file=table, remedy=remedy)


def _check_grids(image: Path, mask: Path) -> None:
    ours, theirs = read_geometry(image), read_geometry(mask)
    if ours.shape_zyx == theirs.shape_zyx:
        far = np.diag(ours.shape_zyx)  # the origin and the ends of the three axes fix a grid
        points = np.vstack([np.zeros(3), far])
        if np.abs(ours.to_lps_mm(points) - theirs.to_lps_mm(points)).max() < SAME_PLACE_MM:
            return
    raise GeometryError(
        "grid-mismatch", file=image, image=ours, mask=theirs, remedy="resample the mask onto the image's grid"
    )


def _nodules(mask: np.ndarray, geometry: Geometry) -> tuple[Nodule, ...]:
    labels, count = cc3d.connected_components(mask, connectivity=26, return_N=True)
    statistics = cc3d.statistics(labels)
    voxel_mm3 = math.prod(geometry.spacing_mm)
    return tuple(
        Nodule(
            nodule_id=str(label),
            centre_lps_mm=vector(geometry.to_lps_mm(statistics["centroids"][label])),
            diameter_mm=math.cbrt(6 / math.pi * float(statistics["voxel_counts"][label]) * voxel_mm3),
            readers=0,
        )
        for label in range(1, count + 1)
    )
