"""Measurements of segmented nodules on the grid of their scan."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial.distance import pdist

from lungseg.scan.volume import Geometry, Volume


@dataclass(frozen=True)
class NoduleMeasurement:
    """One nodule. `centre_lps_mm` is the patient coordinate (x, y, z) of the mean of its voxels.

    `equivalent_diameter_mm` is that of a ball of the same volume, `max_axial_diameter_mm` the long axis in
    the axial slice where it is longest, `sd_hu` the population's standard deviation, `probability` the
    model's mean over the voxels (None if not given).
    """

    label: int
    centre_lps_mm: tuple[float, float, float]
    voxels: int
    volume_mm3: float
    equivalent_diameter_mm: float
    max_axial_diameter_mm: float
    mean_hu: float
    sd_hu: float
    probability: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, rounded to thousandths (micrometres are far below a scanner's resolution)."""
        plain = {key: round(v, 3) if isinstance(v, float) else v for key, v in asdict(self).items()}
        return plain | {"centre_lps_mm": [round(v, 3) for v in self.centre_lps_mm]}


def measure(
    labels: np.ndarray, volume: Volume, probability: np.ndarray | None = None
) -> list[NoduleMeasurement]:
    """Every nonzero label of `labels` (int [z, y, x], on the grid of `volume`), in ascending order."""
    boxes = ndimage.find_objects(labels)
    return [
        _measure_one(label, box, labels, volume, probability)
        for label, box in enumerate(boxes, start=1)
        if box is not None
    ]


def _measure_one(
    label: int, box: tuple[slice, ...], labels: np.ndarray, volume: Volume, probability: np.ndarray | None
) -> NoduleMeasurement:
    inside = labels[box] == label
    hu = volume.volume_hu[box][inside].astype(np.float64)
    centre_zyx = np.argwhere(inside).mean(axis=0) + [side.start for side in box]
    x, y, z = volume.geometry.to_lps_mm(centre_zyx).tolist()
    volume_mm3 = hu.size * math.prod(volume.geometry.spacing_mm)
    return NoduleMeasurement(
        label=label,
        centre_lps_mm=(x, y, z),
        voxels=hu.size,
        volume_mm3=volume_mm3,
        equivalent_diameter_mm=(6 * volume_mm3 / math.pi) ** (1 / 3),
        max_axial_diameter_mm=_max_axial_diameter_mm(inside, volume.geometry),
        mean_hu=float(hu.mean()),
        sd_hu=float(hu.std()),
        probability=None if probability is None else float(probability[box][inside].mean(dtype=np.float64)),
    )


def _max_axial_diameter_mm(inside: np.ndarray, geometry: Geometry) -> float:
    """Largest Feret diameter over the slices across the index axis nearest to the patient's long axis.

    It spans the midpoints of voxel faces, where a surface mesh has its vertices (PyRadiomics'
    Maximum2DDiameterSlice). Balls of 3 to 30 mm come out 0.2 to 0.8 voxels too long; between voxel
    centres small ones would come out as much too short, and a single voxel would have no width at all.
    """
    axial = 2 - int(np.argmax(np.abs(geometry.direction_lps[2])))
    in_plane_mm = np.delete(geometry.spacing_mm, axial)
    faces = np.array([[0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])
    longest = 0.0
    for plane in np.moveaxis(inside, axial, 0):
        rows = np.flatnonzero(plane.any(axis=1))
        if not rows.size:
            continue
        # The ends of rows suffice: they hold all corners of the convex hull.
        first = plane[rows].argmax(axis=1)
        last = plane.shape[1] - 1 - plane[rows, ::-1].argmax(axis=1)
        ends = np.concatenate([np.column_stack([rows, first]), np.column_stack([rows, last])])
        points_mm = (ends[:, None] + faces).reshape(-1, 2) * in_plane_mm
        longest = max(longest, float(pdist(points_mm).max()))
    return longest
