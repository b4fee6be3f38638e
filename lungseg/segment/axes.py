"""The two diameters that radiologists measure, on outlines between pixels.

The long axis is the longest line between two points of one outline in one axial slice, in the slice where it
is longest; the short axis is the longest line across the same outline at right angles to it. Lung-RADS 2022
(American College of Radiology) and the Fleischner Society (MacMahon et al., Radiology 284, 2017; Bankier et
al., Radiology 285, 2017) decide by the mean of the two: it is formed of unrounded axes here and rounded last,
by Lung-RADS to 0.1 mm, by Fleischner to whole millimetres, halves upwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist, squareform
from skimage.measure import find_contours

from lungseg.scan.volume import Vector, vector
from lungseg.segment.levels import LevelSet

Line = tuple[Vector, Vector]


@dataclass(frozen=True)
class Axes:
    """Both axes, as lines between patient coordinates (x, y, z), in the scan's slice `slice_index`, which
    counts from 0 along the index axis that runs nearest to the patient's long axis."""

    slice_index: int
    long_lps_mm: Line
    short_lps_mm: Line

    @property
    def long_mm(self) -> float:
        return float(np.linalg.norm(np.subtract(*self.long_lps_mm)))

    @property
    def short_mm(self) -> float:
        return float(np.linalg.norm(np.subtract(*self.short_lps_mm)))

    @property
    def mean_mm(self) -> float:
        return (self.long_mm + self.short_mm) / 2


def axial_axes(level: LevelSet) -> Axes | None:
    """The axes of a nodule in the slices of its scan; None where no slice passes through it.

    Balls and ellipsoids of 4 to 30 mm on pixels of 0.7 mm and slices of 1 mm come out right within 0.1 mm in
    the mean. In thick slices they are too short, since none passes through the middle.
    """
    axis = 2 - int(np.argmax(np.abs(level.geometry.direction_lps[2])))
    best: tuple[float, int, np.ndarray] | None = None
    for voxel in range(level.box[axis].stop - level.box[axis].start):
        for outline in _outlines(level, axis, voxel):
            longest = float(pdist(_corners(outline)).max())
            if best is None or longest > best[0]:
                best = longest, voxel, outline
    if best is None:
        return None
    _, voxel, outline = best
    part = 1 + level.cuts_zyx[axis] // 2 + voxel * level.cuts_zyx[axis]
    in_plane = np.delete(level.geometry.spacing_mm, axis)
    lines = []
    for line_mm in _axes(outline):
        first, last = level.geometry.to_lps_mm(np.insert(line_mm / in_plane, axis, part, axis=1))
        lines.append((vector(first), vector(last)))
    return Axes(level.box[axis].start + voxel, lines[0], lines[1])


def rounded(diameter_mm: float, to: str) -> float:
    """To a multiple of the power of ten `to`, halves upwards."""
    return float(Decimal(diameter_mm).quantize(Decimal(to), ROUND_HALF_UP))


def _outlines(level: LevelSet, axis: int, voxel: int) -> list[np.ndarray]:
    """Closed outlines [n, 2] in mm in one slice of the scan."""
    in_plane = np.delete(level.geometry.spacing_mm, axis)
    return [outline * in_plane for outline in find_contours(level.plane(axis, voxel), 0)]


def _corners(outline: np.ndarray) -> np.ndarray:
    """Those of the convex hull, between which the longest line lies."""
    corners: np.ndarray = outline[ConvexHull(outline, qhull_options="QJ").vertices]  # flat ones too
    return corners


def _axes(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The long and the short axis [2, 2] of one outline [n, 2], whose last point is its first."""
    corners = _corners(outline)
    distances = squareform(pdist(corners))
    first, last = corners[list(np.unravel_index(int(distances.argmax()), distances.shape))]
    along = (last - first) / np.linalg.norm(last - first)
    across = np.array([-along[1], along[0]])
    at, height = outline @ along, outline @ across
    # A line across at each point of the outline, and where it meets the pieces of the outline.
    start, stop = at[:-1], at[1:]
    meets = (at[:, None] >= np.minimum(start, stop)) & (at[:, None] <= np.maximum(start, stop))
    step = np.where(stop == start, 1, stop - start)
    heights = height[:-1] + (at[:, None] - start) / step * np.diff(height)
    top = np.where(meets, heights, -np.inf).max(axis=1)
    bottom = np.where(meets, heights, np.inf).min(axis=1)
    widest = int(np.argmax(top - bottom))
    ends = np.array([bottom[widest], top[widest]])
    short = at[widest] * along + ends[:, None] * across
    return np.stack([first, last]), short
