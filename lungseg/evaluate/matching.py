"""Nodule by nodule: which predicted component stands for which nodule, and how well.

All from the label volumes of one scan: integers [z, y, x], 0 the background. Voxels where `ignore` is nonzero
count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from lungseg.errors import GeometryError


@dataclass(frozen=True)
class Overlap:
    """Labels that occur, in ascending order, and their voxels outside ignored regions: `shared` is
    [nodules, components], the others count one label each. `ignored_voxels` are those of each component
    inside ignored regions."""

    nodules: np.ndarray
    components: np.ndarray
    shared: np.ndarray
    nodule_voxels: np.ndarray
    component_voxels: np.ndarray
    ignored_voxels: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """[nodules, components]."""
        return self.shared / (self._both - self.shared)

    @property
    def dice(self) -> np.ndarray:
        """[nodules, components]."""
        return 2 * self.shared / self._both

    @property
    def _both(self) -> np.ndarray:
        both = self.nodule_voxels[:, None] + self.component_voxels
        return np.maximum(both, 1)  # a component that is ignored altogether shares nothing with anyone

    def ignored(self, share: float = 0.0) -> np.ndarray:
        """bool [components]: whether more than this share of a component lies in ignored regions."""
        return self.ignored_voxels > share * (self.component_voxels + self.ignored_voxels)


Parts = tuple[float, float]
"""Numerator and denominator: those of several scans are added up before one is divided by the other."""


@dataclass(frozen=True)
class Matching:
    """One scan: `pairs` are (nodule, component) by label, with the IoU and the Dice of each.

    F1 (recognition quality), SQ (segmentation quality, the mean IoU of pairs) and PQ (panoptic quality, their
    product) are Kirillov et al.'s (Panoptic segmentation, CVPR 2019)."""

    pairs: tuple[tuple[int, int], ...]
    iou: tuple[float, ...]
    dice: tuple[float, ...]
    missed: tuple[int, ...]
    false_positives: tuple[int, ...]

    @property
    def f1(self) -> Parts:
        return len(self.pairs), self._pairs_and_half_of_errors

    @property
    def sq(self) -> Parts:
        return sum(self.iou), len(self.pairs)

    @property
    def pq(self) -> Parts:
        return sum(self.iou), self._pairs_and_half_of_errors

    @property
    def dice_errors_as_0(self) -> Parts:
        """The mean Dice over nodules and false positives; misses are 0 too."""
        return sum(self.dice), len(self.pairs) + len(self.missed) + len(self.false_positives)

    @property
    def _pairs_and_half_of_errors(self) -> float:
        return len(self.pairs) + (len(self.missed) + len(self.false_positives)) / 2


def overlap(nodules: np.ndarray, components: np.ndarray, ignore: np.ndarray | None = None) -> Overlap:
    """Count once what every rule of matching asks for. Raises GeometryError("shape-mismatch")."""
    shapes = [array.shape for array in (nodules, components, ignore) if array is not None]
    if len(set(shapes)) > 1:
        raise GeometryError("shape-mismatch", shapes=shapes, remedy="give labels on one grid")
    labelled = (nodules != 0) | (components != 0)
    rows, columns = nodules[labelled], components[labelled]
    ignored = np.zeros(rows.shape, bool) if ignore is None else ignore[labelled] != 0
    row_labels, row = np.unique(rows, return_inverse=True)
    column_labels, column = np.unique(columns, return_inverse=True)
    shape = len(row_labels), len(column_labels)

    def table(chosen: np.ndarray) -> np.ndarray:
        cells = np.ravel_multi_index((row[chosen], column[chosen]), shape)
        return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)

    counted, within = table(~ignored), table(ignored)
    of_nodules, of_components = row_labels != 0, column_labels != 0
    real = of_nodules & (counted.sum(axis=1) > 0)  # one that is ignored altogether is none
    return Overlap(
        nodules=row_labels[real],
        components=column_labels[of_components],
        shared=counted[real][:, of_components],
        nodule_voxels=counted.sum(axis=1)[real],
        component_voxels=counted.sum(axis=0)[of_components],
        ignored_voxels=within.sum(axis=0)[of_components],
    )


def match(found: Overlap, min_iou: float = 0.0) -> Matching:
    """One to one, at an IoU above `min_iou`, so that the sum of the pairs' IoU is the greatest.

    Above 0.5 there is only one way (Kirillov et al.); below, the assignment is Kuhn and Munkres's. Components
    without a nodule are false positives, unless more than `min_iou` of them is ignored, as with Kirillov's
    void; where that is 0, one voxel will do.
    """
    eligible = np.where(found.iou > min_iou, found.iou, 0)
    rows, columns = linear_sum_assignment(eligible, maximize=True)
    kept = eligible[rows, columns] > 0
    rows, columns = rows[kept], columns[kept]
    free = np.ones(len(found.components), bool)
    free[columns] = False
    false_positives = found.components[free & ~found.ignored(min_iou)]
    pairs = zip(found.nodules[rows].tolist(), found.components[columns].tolist(), strict=True)
    return Matching(
        pairs=tuple(pairs),
        iou=tuple(found.iou[rows, columns].tolist()),
        dice=tuple(found.dice[rows, columns].tolist()),
        missed=tuple(np.delete(found.nodules, rows).tolist()),
        false_positives=tuple(false_positives.tolist()),
    )
