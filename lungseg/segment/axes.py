"""The two diameters that radiologists measure, on outlines between pixels.

The long axis is the longest line between two points of one outline in one axial plane, in the plane where it
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

MOST_POINTS = 4000
MOST_PIXELS = 1 << 22  # of all planes: a mass of ten centimetres has half as many
Line = tuple[Vector, Vector]


@dataclass(frozen=True)
class Axes:
    """Both axes, as lines between patient coordinates (x, y, z), in a plane within the scan's slice
    `slice_index`, which counts from 0 along the index axis that runs nearest to the patient's long axis."""

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
    """The axes of a nodule in the axial planes of its level set, which lie between the scan's slices too;
    None where none passes through it.

    So they do not depend on where thick slices happen to cut: balls and ellipsoids of 4 to 30 mm on pixels of
    0.7 mm and slices of 1 to 3 mm come out right within 0.1 mm in the mean.
    """
    axis = 2 - int(np.argmax(np.abs(level.geometry.direction_lps[2])))
    in_plane = np.delete(level.geometry.spacing_mm, axis)
    planes = np.moveaxis(level.values, axis, 0)
    bounds_mm = _bounds_mm(planes > 0, in_plane)
    longest, best = 0.0, None
    # What is no nodule, but half a body, is looked at in some of its planes only.
    some = range(0, len(planes), 1 + planes.size // MOST_PIXELS)
    for part in sorted(some, key=lambda plane: -bounds_mm[plane]):
        if bounds_mm[part] <= longest:
            break
        for outline in (line * in_plane for line in find_contours(planes[part], 0)):
            if np.linalg.norm(np.ptp(outline, axis=0)) <= longest:
                continue
            length = float(pdist(_corners(outline)).max())
            if length > longest:
                longest, best = length, (part, outline)
    if best is None:
        return None
    part, outline = best
    lines = []
    for line_mm in _axes(outline):
        first, last = level.geometry.to_lps_mm(np.insert(line_mm / in_plane, axis, part, axis=1))
        lines.append((vector(first), vector(last)))
    voxels = level.box[axis].stop - level.box[axis].start
    voxel = min((part - 1) // level.cuts_zyx[axis], voxels - 1)
    return Axes(level.box[axis].start + voxel, lines[0], lines[1])


def _bounds_mm(planes: np.ndarray, in_plane_mm: np.ndarray) -> np.ndarray:
    """Of each plane of bool `planes` [n, row, column] what no line in it is longer than; 0 for empty ones."""
    squares = np.zeros(len(planes))
    for along, spacing_mm in zip((2, 1), in_plane_mm, strict=True):
        touched = np.asarray(planes.any(axis=along))
        first, last = touched.argmax(axis=1), touched.shape[1] - touched[:, ::-1].argmax(axis=1)
        # An outline ends less than a pixel beyond the outermost centres.
        squares += ((last - first + 1) * spacing_mm) ** 2
    return np.where(planes.any(axis=(1, 2)), np.sqrt(squares), 0)


def rounded(diameter_mm: float, to: str) -> float:
    """To a multiple of the power of ten `to`, halves upwards."""
    return float(Decimal(diameter_mm).quantize(Decimal(to), ROUND_HALF_UP))


def _corners(outline: np.ndarray) -> np.ndarray:
    """Those of the convex hull, between which the longest line lies."""
    corners: np.ndarray = outline[ConvexHull(outline, qhull_options="QJ").vertices]  # flat ones too
    return corners


def _axes(outline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The long and the short axis [2, 2] of one outline [n, 2], whose last point is its first.

    What has more than MOST_POINTS is no nodule's: of such an outline only some are looked at.
    """
    outline = np.append(outline[: -1 : 1 + len(outline) // MOST_POINTS], outline[:1], axis=0)
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
