"""How nodules have changed between two scans of one patient, from what `predict` wrote of each.

The scans are laid upon one another by a rigid motion of the lungs; nodules that then lie next to each other
are one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from lungseg.errors import ConfigError, DataError
from lungseg.scan.volume import read_labels, to_sitk

NOISE_SHARE = 0.25
"""Volumes of a nodule on two CTs of the same day differ by less than this in 95 of 100 (Gietema et al.,
Radiology 241, 2006: -21 to 24 %); the NELSON trial and the Fleischner Society call 25 % and more growth."""
NEAR_MM = 15.0  # breathing moves nodules against the lungs' outline by up to this
BLOCK_MM, REACH_MM = 4.0, 25.0


@dataclass(frozen=True)
class Followed:
    """A nodule's label, volume and mean diameter in mm in both scans, None where it was not found.

    `apart_mm` is how far both middles lie apart after the registration. `volume_change` is V2 / V1 - 1.
    `doubling_days`, days ln 2 / ln(V2 / V1), assumes exponential growth (Schwartz, Cancer 14, 1961); it is
    None where the volume has not grown.
    """

    earlier: int | None
    later: int | None
    apart_mm: float | None = None
    earlier_mm3: float | None = None
    later_mm3: float | None = None
    earlier_mean_axial_diameter_mm: float | None = None
    later_mean_axial_diameter_mm: float | None = None
    volume_change: float | None = None
    beyond_noise: bool | None = None
    doubling_days: float | None = None


@dataclass(frozen=True)
class Result:
    """What `predict` wrote of one scan. `lungs` is None where none were found."""

    folder: Path
    scan: str
    nodules: tuple[dict, ...]
    lungs: sitk.Image | None

    @property
    def centres_lps_mm(self) -> np.ndarray:
        return np.array([one["centre_lps_mm"] for one in self.nodules], float).reshape(-1, 3)


def read_result(folder: Path) -> Result:
    """Raises DataError("result-unreadable")."""
    try:
        said = json.loads((folder / "nodules.json").read_bytes())
        nodules = tuple(said["nodules"])
        for one in nodules:
            one["label"], one["volume_mm3"], one["centre_lps_mm"], one["mean_axial_diameter_mm"]
        scan = str(said["scan"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        remedy = "give a folder that `lungseg predict` of this version wrote: OUT/<case id>"
        raise DataError("result-unreadable", folder=folder, remedy=remedy) from error
    file = folder / "lungs.nii.gz"
    return Result(folder, scan, nodules, to_sitk(*read_labels(file)) if file.exists() else None)


def follow(
    earlier: Result, later: Result, days: float, pairs: Sequence[tuple[int, int]] = ()
) -> tuple[list[Followed], float | None]:
    """Every nodule of both scans once, in the order of the later labels, and the Dice of both lungs after the
    registration (None without one).

    `pairs` of labels (earlier, later) are taken as they are. The others are matched one to one, so that the
    sum of their distances is least, within NEAR_MM; that needs the lungs of both. Raises
    DataError("scans-equal", "pair-unknown", "lungs-missing").
    """
    if earlier.scan == later.scan:
        raise DataError("scans-equal", folder=later.folder, remedy="give results of two scans of one patient")
    first, second = _by_label(earlier), _by_label(later)
    unknown = [f"{a}:{b}" for a, b in pairs if a not in first or b not in second]
    twice = len({a for a, _ in pairs}) < len(pairs) or len({b for _, b in pairs}) < len(pairs)
    if unknown or twice:
        remedy = "give each label of nodules.json once, as EARLIER:LATER"
        raise DataError("pair-unknown", pairs=",".join(unknown) or pairs, remedy=remedy)
    matched: dict[int, tuple[int, float | None]] = {b: (a, None) for a, b in pairs}
    dice = None
    left = [label for label in first if label not in dict(pairs)]
    free = [label for label in second if label not in matched]
    if left and free:
        moved, dice = _laid_upon(earlier, later)
        at = {one["label"]: place for one, place in zip(earlier.nodules, moved, strict=True)}
        targets = np.array([second[label]["centre_lps_mm"] for label in free])
        matched |= _nearest(left, np.array([at[label] for label in left]), free, targets)
    rows = [
        _compared(first[matched[label][0]], second[label], matched[label][1], days)
        if label in matched
        else Followed(None, label, later_mm3=second[label]["volume_mm3"])
        for label in second
    ]
    kept = {a for a, _ in matched.values()}
    gone = [label for label in first if label not in kept]
    return rows + [Followed(label, None, earlier_mm3=first[label]["volume_mm3"]) for label in gone], dice


def labels_of(pair: str) -> tuple[int, int]:
    """The two labels of "EARLIER:LATER". Raises ConfigError("pair-syntax")."""
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pair)
    if not found:
        remedy = "write the labels as EARLIER:LATER, for example 1:2"
        raise ConfigError("pair-syntax", pair=pair, remedy=remedy)
    return int(found[1]), int(found[2])


def _by_label(result: Result) -> dict[int, dict]:
    return {one["label"]: one for one in result.nodules}


def _compared(first: dict, second: dict, apart_mm: float | None, days: float) -> Followed:
    ratio = second["volume_mm3"] / first["volume_mm3"]
    return Followed(
        first["label"],
        second["label"],
        apart_mm,
        first["volume_mm3"],
        second["volume_mm3"],
        first["mean_axial_diameter_mm"],
        second["mean_axial_diameter_mm"],
        ratio - 1,
        abs(ratio - 1) >= NOISE_SHARE,
        days * math.log(2) / math.log(ratio) if ratio > 1 else None,
    )


def _nearest(
    left: Sequence[int], moved: np.ndarray, free: Sequence[int], targets: np.ndarray
) -> dict[int, tuple[int, float | None]]:
    """By later label: the earlier one, and how far apart they are."""
    apart_mm = cdist(moved, targets)
    # What is too far costs as much as any other that is: it must not push a near pair apart.
    rows, columns = linear_sum_assignment(np.minimum(apart_mm, NEAR_MM))
    return {
        free[column]: (left[row], float(apart_mm[row, column]))
        for row, column in zip(rows, columns, strict=True)
        if apart_mm[row, column] < NEAR_MM
    }


def _laid_upon(earlier: Result, later: Result) -> tuple[np.ndarray, float]:
    """The middles of the earlier nodules in the later scan, and the Dice of both lungs there."""
    fixed, moving = _lungs(earlier), _lungs(later)
    transform = rigid(fixed, moving)
    there = sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(fixed != 0, there != 0)
    moved = [transform.TransformPoint(place) for place in earlier.centres_lps_mm.tolist()]
    return np.array(moved), overlap.GetDiceCoefficient()


def _lungs(result: Result) -> sitk.Image:
    if result.lungs is None:
        remedy = "say which nodules are the same: --pair EARLIER:LATER"
        raise DataError("lungs-missing", folder=result.folder, remedy=remedy)
    return result.lungs


def rigid(earlier: sitk.Image, later: sitk.Image) -> sitk.Transform:
    """The rigid motion that takes points of the earlier scan to the later, by least squares of the distances
    to the lungs' outlines, in millimetres, up to REACH_MM."""
    fixed, moving = _distances(earlier), _distances(later)
    start = sitk.CenteredTransformInitializer(
        fixed < 0, moving < 0, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=False)
    return method.Execute(fixed, moving)


def _distances(lungs: sitk.Image) -> sitk.Image:
    """Signed distances to the outline, negative inside, on blocks of about BLOCK_MM."""
    blocks = [max(1, round(BLOCK_MM / spacing)) for spacing in lungs.GetSpacing()]
    small = sitk.BinShrink(sitk.Cast(lungs != 0, sitk.sitkFloat32), blocks) >= 0.5
    distances = sitk.SignedMaurerDistanceMap(small, squaredDistance=False, useImageSpacing=True)
    return sitk.Clamp(distances, sitk.sitkFloat32, -REACH_MM, REACH_MM)
