"""Distances between the surfaces of two masks, weighted by area (Nikolov et al., Deep learning to achieve
clinically applicable segmentation of head and neck anatomy, 2018, and their `surface-distance`).

A mask's surface runs through the cells between the centres of 2x2x2 neighbouring voxels. A cell whose
voxels are neither all inside nor all outside is one element: it lies at the cell's middle, and its area is
that of the triangles that marching cubes (Lorensen and Cline, 1987) puts between inside and outside there.
Where the two sides of a cell would be parted by different triangles, the smaller area counts.
Such surfaces have steps: a ball's area comes out 7 to 10 % too large, and a distance goes to the nearest
step rather than straight across.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from lungseg.errors import GeometryError
from lungseg.scan.volume import bounding_box

Spacing = tuple[float, float, float]
BITS = 1 << np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
"""Of the code of a cell: which of its voxels are inside."""


@dataclass(frozen=True)
class SurfaceDistances:
    """Every surface element of the reference with its distance to the nearest one of the prediction, and the
    other way round; `areas_mm2` belong to `distances_mm`, in ascending order of these."""

    reference_distances_mm: np.ndarray
    reference_areas_mm2: np.ndarray
    predicted_distances_mm: np.ndarray
    predicted_areas_mm2: np.ndarray

    @property
    def empty(self) -> tuple[bool, bool]:
        """Whether the reference, and whether the prediction, has no surface."""
        return not self.reference_areas_mm2.size, not self.predicted_areas_mm2.size

    def dice(self, tolerance_mm: float) -> float:
        """Share of both surfaces' area that lies within `tolerance_mm` of the other surface.

        Two empty masks score 1.0, one empty mask 0.0.
        """
        if any(self.empty):
            return float(all(self.empty))
        within = sum(areas[distances <= tolerance_mm].sum() for distances, areas in self._both)
        return float(within / sum(areas.sum() for _, areas in self._both))

    def hausdorff_mm(self, percent: float = 95) -> float | None:
        """The larger of both directions' distances that this share of the area does not exceed (HD95; with
        100 the Hausdorff distance). None if a mask is empty."""
        if any(self.empty):
            return None
        return float(max(_percentile(*direction, percent) for direction in self._both))

    def mean_mm(self) -> float | None:
        """The mean distance over the area of both surfaces. None if a mask is empty."""
        if any(self.empty):
            return None
        far = sum((distances * areas).sum() for distances, areas in self._both)
        return float(far / sum(areas.sum() for _, areas in self._both))

    @property
    def _both(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return (
            (self.reference_distances_mm, self.reference_areas_mm2),
            (self.predicted_distances_mm, self.predicted_areas_mm2),
        )


def surface_distances(reference: np.ndarray, predicted: np.ndarray, spacing_mm: Spacing) -> SurfaceDistances:
    """Of two masks (nonzero inside) [z, y, x] on one grid of `spacing_mm` (z, y, x).

    Raises GeometryError("shape-mismatch").
    """
    if reference.shape != predicted.shape:
        shapes = reference.shape, predicted.shape
        raise GeometryError("shape-mismatch", shapes=shapes, remedy="give masks on one grid")
    (here_mm, here_mm2), (there_mm, there_mm2) = (
        _elements(mask, spacing_mm) for mask in (reference, predicted)
    )
    from_here, from_there = _nearest(here_mm, there_mm), _nearest(there_mm, here_mm)
    return SurfaceDistances(*_in_order(from_here, here_mm2), *_in_order(from_there, there_mm2))


def _elements(mask: np.ndarray, spacing_mm: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """Where the surface's elements are, [n, 3] in mm from the first voxel (z, y, x), and their areas."""
    box = bounding_box(mask)
    if not box:
        return np.empty((0, 3)), np.empty(0)
    # A mask may end at the scan's border, and its surface there is as real as any.
    inside = np.pad(mask[box] != 0, 1)
    codes = np.zeros([side - 1 for side in inside.shape], np.uint8)
    for corner in np.ndindex(2, 2, 2):
        window = tuple(slice(start, start + side) for start, side in zip(corner, codes.shape, strict=True))
        codes += BITS[corner] * inside[window]
    cells = np.argwhere((codes != 0) & (codes != 255))
    areas = _cell_areas_mm2(spacing_mm)[codes[tuple(cells.T)]]
    return (cells + [side.start - 0.5 for side in box]) * spacing_mm, areas


@lru_cache(maxsize=64)
def _cell_areas_mm2(spacing_mm: Spacing) -> np.ndarray:
    """float64 [256]: the area in a cell of each code."""
    areas = np.zeros(256)
    for code, (a, b, c) in enumerate(_cell_triangles(), start=1):
        normals = np.cross((b - a) * spacing_mm, (c - a) * spacing_mm)
        areas[code] = np.linalg.norm(normals, axis=-1).sum() / 2
    return np.minimum(areas, areas[::-1])  # the code of a cell's other side is 255 - code


@lru_cache(maxsize=1)
def _cell_triangles() -> list[np.ndarray]:
    """The corners [3, triangles, 3] of marching cubes' triangles in a unit cell, for codes 1 to 254."""
    found = []
    for code in range(1, 255):
        cell = (BITS & code != 0).astype(np.float32)
        vertices, faces, _, _ = marching_cubes(cell, 0.5, method="lorensen")
        found.append(vertices.astype(np.float64)[faces].swapaxes(0, 1))
    return found


def _nearest(from_mm: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
    if not len(from_mm) or not len(to_mm):
        return np.full(len(from_mm), np.inf)
    return cKDTree(to_mm).query(from_mm)[0]


def _in_order(distances_mm: np.ndarray, areas_mm2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((areas_mm2, distances_mm))
    return distances_mm[order], areas_mm2[order]


def _percentile(distances_mm: np.ndarray, areas_mm2: np.ndarray, percent: float) -> float:
    shares = np.cumsum(areas_mm2) / areas_mm2.sum()
    place = int(np.searchsorted(shares, percent / 100))
    return float(distances_mm[min(place, len(distances_mm) - 1)])
