"""A nodule between voxels: where the probability passes the threshold, finer than any grid.

Probabilities are known at the voxels of the working grid, on which the network sees a scan; the nodule is
shown on the scan's own grid. Between voxels the probability is their cubic B-spline (Unser, "Splines: a
perfect fit for signal and image processing", IEEE Signal Processing Magazine 16, 1999), which keeps curved
surfaces in place. Linear interpolation cuts them off: of a 6 mm ball on a 1 mm grid it takes 6 % of the
volume.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from lungseg.scan.volume import Geometry, Volume, vector

STEP_MM, STEPS_ACROSS = 0.35, 40
SPLINE_MARGIN = 8  # voxels; what lies beyond has a weight of less than 3e-5


@dataclass(frozen=True)
class LevelSet:
    """`values` [z, y, x] are positive inside the nodule and 0 on its surface, on the grid `geometry`.

    It has the scan's axes. Each voxel of the scan's box `box` is cut into `cuts_zyx` parts, odd numbers, so
    that the middle part lies at its centre. One part more on each side is negative: the surface is closed.
    """

    values: np.ndarray
    geometry: Geometry
    cuts_zyx: tuple[int, int, int]
    box: tuple[slice, ...]

    @property
    def voxels(self) -> np.ndarray:
        """bool over `box`: the scan's voxels whose centre lies inside."""
        centres = tuple(slice(1 + cuts // 2, -1, cuts) for cuts in self.cuts_zyx)
        inside: np.ndarray = self.values[centres] > 0
        return inside

    def denser_than(self, level_hu: float, volume: Volume) -> LevelSet:
        """The part of the nodule above `level_hu` in `volume`, whose HU are interpolated linearly."""
        near = _wider(self.box, 1, volume.geometry)
        hu = _onto(self.geometry, volume.volume_hu[near], volume.geometry.part(near), order=1)
        values = np.minimum(self.values, (hu - level_hu) / 1000)
        return LevelSet(values, self.geometry, self.cuts_zyx, self.box)


def level_set(
    probability: np.ndarray,
    labels: np.ndarray,
    tight: tuple[slice, ...],
    label: int,
    threshold: float,
    grid: Geometry,
    scan: Geometry,
    cut: bool = True,
) -> LevelSet | None:
    """The surface of the component `label` of `probability` (int and float32 [z, y, x], on `grid`) on `scan`.

    `tight` is the component's box. The surface passes no further than one voxel of `grid` from it, where
    others may begin. Without `cut` no voxel is cut into parts, as sizes need it; which voxels lie inside is
    the same. None where the component lies outside of `scan`.
    """
    box = _around(tight, grid, scan)
    if not box:
        return None
    near = _wider(tight, SPLINE_MARGIN, grid)
    component = (labels[near] == label).astype(np.float32)
    volume_mm3 = np.count_nonzero(component) * math.prod(grid.spacing_mm)
    diameter_mm = (6 * volume_mm3 / math.pi) ** (1 / 3)
    step_mm = max(STEP_MM, diameter_mm / STEPS_ACROSS)
    depth, height, width = (2 * math.ceil((spacing / step_mm - 1) / 2) + 1 for spacing in scan.spacing_mm)
    cuts = (depth, height, width) if cut else (1, 1, 1)
    fine = _cut(scan, box, cuts)
    values = _onto(fine, probability[near], grid.part(near), order=3)
    reach = _onto(fine, component, grid.part(near), order=1)
    values -= np.float32(threshold)
    outside = reach < 1e-3  # not 0, which rounding would decide
    for axis in range(3):
        outside.swapaxes(0, axis)[[0, -1]] = True
    values[outside] = -np.abs(values[outside])
    return LevelSet(values, fine, cuts, box)


def _wider(box: tuple[slice, ...], voxels: int, grid: Geometry) -> tuple[slice, ...]:
    """`box` and so many voxels more on each side, where `grid` has them."""
    return tuple(
        slice(max(0, side.start - voxels), min(side.stop + voxels, size))
        for side, size in zip(box, grid.shape_zyx, strict=True)
    )


def _around(tight: tuple[slice, ...], grid: Geometry, scan: Geometry) -> tuple[slice, ...]:
    """The voxels of `scan` around those of `grid` in `tight` and one more on each side; () if there are
    none."""
    corners = np.array(list(itertools.product(*((side.start - 1, side.stop) for side in tight))))
    indices = scan.to_index_zyx(grid.to_lps_mm(corners))
    first = np.maximum(np.floor(indices.min(axis=0)).astype(int), 0)
    stop = np.minimum(np.ceil(indices.max(axis=0)).astype(int) + 1, scan.shape_zyx)
    return tuple(map(slice, first.tolist(), stop.tolist())) if (first < stop).all() else ()


def _cut(scan: Geometry, box: tuple[slice, ...], cuts: tuple[int, int, int]) -> Geometry:
    """The grid of the parts into which the voxels of `box` are cut, and one part more on each side."""
    first = [side.start - (cut + 1) / 2 / cut for side, cut in zip(box, cuts, strict=True)]
    depth, height, width = ((side.stop - side.start) * cut + 2 for side, cut in zip(box, cuts, strict=True))
    return Geometry(
        (depth, height, width),
        vector(np.divide(scan.spacing_mm, cuts)),
        vector(scan.to_lps_mm(np.array(first))),
        scan.direction_lps,
    )


def _onto(target: Geometry, array: np.ndarray, source: Geometry, order: int) -> np.ndarray:
    """`array` on `source` as float32 on the grid `target`, by splines of `order`; beyond its ends it goes on
    as it ends. The axes of both are parallel, in any order and sense: so each is interpolated by itself, a
    product of matrices, in a tenth of the time of three at once."""
    shift = source.to_index_zyx(target.to_lps_mm((0.0, 0.0, 0.0)))
    scale = (source.to_index_zyx(target.to_lps_mm(np.eye(3))) - shift).T
    partner = np.abs(scale).argmax(axis=1)  # of each axis of `source`
    operands: list[Any] = [array.astype(np.float32, copy=False), [0, 1, 2]]
    for axis, other in enumerate(partner):
        size, fine = source.shape_zyx[axis], target.shape_zyx[other]
        step, first = [scale[axis, other], 1], [shift[axis], 0]
        weights = ndimage.affine_transform(
            np.eye(size, dtype=np.float32), step, first, (fine, size), order=order, mode="nearest"
        )
        operands += [weights, [3 + other, axis]]
    onto: np.ndarray = np.einsum(*operands, [3, 4, 5], optimize=True)
    return np.ascontiguousarray(onto)
