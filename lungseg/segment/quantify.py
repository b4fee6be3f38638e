"""Measurements of nodules on their surfaces between voxels, and the label map that goes with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import edt
import numpy as np
from scipy import ndimage
from skimage.measure import marching_cubes, mesh_surface_area

from lungseg.config import SegmentConfig
from lungseg.scan.volume import Geometry, Vector, Volume, bounding_box, vector
from lungseg.segment.axes import Line, axial_axes, rounded
from lungseg.segment.levels import LevelSet, level_set

PERCENTILES = (5, 25, 50, 75, 95)
MIDLINE_MM = 10.0  # nearer to it a nodule is said to lie on no side


@dataclass(frozen=True)
class NoduleMeasurement:
    """One nodule; lengths are mm.

    `centre_lps_mm` is the patient coordinate (x, y, z) of its middle, `voxels` counts those of the scan that
    carry its `label`. Volume V and surface A are those of a mesh on the surface (marching cubes, Lewiner et
    al., 2003); the `equivalent_diameter_mm` is (6 V / pi)^(1/3), that of a ball of volume V, the `sphericity`
    (36 pi V^2)^(1/3) / A, 1 for a ball (Wadell, 1935; both as in the Image Biomarker Standardisation
    Initiative, Zwanenburg et al., Radiology 295, 2020).

    Of the axes see `axes`: the longest one and the one at right angles in a plane in `axial_slice`, as lines
    between patient coordinates too, their mean, and that mean as each guideline rounds it. No category of a
    guideline follows from them alone.

    HU are of the voxels: mean, standard deviation of the population, percentiles by linear interpolation.
    `mass_mg` is V (mean HU + 1000) / 1000, with the density of water at 0 and of nothing at -1000 HU (de Hoop
    et al., Radiology 255, 2010). The solid part is denser than `segment.solid_hu`; its axis is None without
    one.

    `pleura_mm` goes from the surface to where the lungs' mask ends, which is the pleura, or the mediastinum
    and the hilum; it is right within a voxel of the working grid. `side` is that of the patient, by the
    middle of both lungs, None within 10 mm of it. Both are None where no lungs were found. `probability` is
    the model's mean, `confidence` the score of the candidate that the nodule is (see `candidates`).
    """

    label: int
    centre_lps_mm: Vector
    voxels: int
    volume_mm3: float
    surface_mm2: float
    sphericity: float
    equivalent_diameter_mm: float
    longest_axial_diameter_mm: float
    perpendicular_axial_diameter_mm: float
    mean_axial_diameter_mm: float
    lung_rads_2022_diameter_mm: float
    fleischner_2017_diameter_mm: float
    axial_slice: int
    long_axis_lps_mm: Line
    short_axis_lps_mm: Line
    mean_hu: float
    sd_hu: float
    percentiles_hu: dict[str, float]
    mass_mg: float
    solid_volume_mm3: float
    solid_longest_axial_diameter_mm: float | None
    pleura_mm: float | None
    side: str | None
    probability: float
    confidence: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, rounded to thousandths (micrometres are far below a scanner's resolution)."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


def quantify(
    labels: np.ndarray,
    probability: np.ndarray,
    grid: Geometry,
    volume: Volume,
    config: SegmentConfig,
    lungs: np.ndarray | None = None,
    confidence: Mapping[int, float] | None = None,
) -> tuple[np.ndarray, list[NoduleMeasurement], list[Surface]]:
    """The components `labels` of `probability` (int and float32 [z, y, x], on `grid`) as int32 labels on the
    grid of `volume`, 1 the largest, and of each the measurements and the surface.

    A voxel has a label where the probability's cubic spline at its centre passes `config.threshold`; a
    component without such a voxel, between thick slices, is left out. `confidence` is by number of component.
    `lungs` (nonzero inside) is on `grid`. A mask is measured as both labels and probability; its stairs
    lengthen the axes by half a voxel or so.
    """
    around = _Lungs.of(lungs, grid) if lungs is not None and lungs.any() and labels.any() else None
    own, placed = _onto_scan(labels, probability, grid, volume.geometry, config.threshold)
    nodules = []
    for number, (label, level, surface) in enumerate(placed, 1):
        hu = volume.volume_hu[level.box][own[level.box] == number].astype(np.float64)
        one = _measure(number, level, surface, hu, volume, config, around)
        nodules.append(replace(one, confidence=(confidence or {}).get(label)))
    return own, nodules, [surface for _, _, surface in placed]


def labels_on_scan(
    labels: np.ndarray, probability: np.ndarray, grid: Geometry, scan: Geometry, threshold: float
) -> tuple[np.ndarray, list[tuple[slice, ...]]]:
    """The labels of `quantify` on the grid `scan`, and the box of each, in a tenth of the time that sizes
    take; the first has the most voxels."""
    levels = list(_levels(labels, probability, grid, scan, threshold, cut=False))
    levels.sort(key=lambda one: -np.count_nonzero(one[1].voxels))
    own, placed = _placed(scan, levels)
    return own, [levels[number][1].box for number in placed]


def _onto_scan(
    labels: np.ndarray, probability: np.ndarray, grid: Geometry, scan: Geometry, threshold: float
) -> tuple[np.ndarray, list[tuple[int, LevelSet, Surface]]]:
    """The labels of `quantify`, and in their order what each was in `labels`, and its surface."""
    found = _levels(labels, probability, grid, scan, threshold)
    surfaces = [(label, level, Surface.of(level)) for label, level in found]
    surfaces.sort(key=lambda one: -one[2].volume_mm3)
    own, placed = _placed(scan, [(label, level) for label, level, _ in surfaces])
    return own, [surfaces[number] for number in placed]


def _levels(
    labels: np.ndarray,
    probability: np.ndarray,
    grid: Geometry,
    scan: Geometry,
    threshold: float,
    cut: bool = True,
) -> Iterator[tuple[int, LevelSet]]:
    """Of every component that has a voxel on `scan`."""
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        level = box and level_set(probability, labels, box, label, threshold, grid, scan, cut)
        if level and level.voxels.any():
            yield label, level


def _placed(scan: Geometry, levels: Sequence[tuple[int, LevelSet]]) -> tuple[np.ndarray, list[int]]:
    """int32 labels on `scan`, and which of the levels each is; where two meet the first has the voxels."""
    own = np.zeros(scan.shape_zyx, np.int32)
    placed: list[int] = []
    for number, (_, level) in enumerate(levels):
        room = own[level.box]
        mine = level.voxels & (room == 0)
        if mine.any():
            placed.append(number)
            room[mine] = len(placed)
    return own, placed


@dataclass(frozen=True)
class Surface:
    """A closed mesh: `points_lps_mm` are float32 [n, 3], `triangles` int32 [m, 3]."""

    points_lps_mm: np.ndarray
    triangles: np.ndarray
    volume_mm3: float
    area_mm2: float

    @classmethod
    def of(cls, level: LevelSet) -> Self:
        points, triangles, _, _ = marching_cubes(level.values, 0)
        points_mm = points * level.geometry.spacing_mm
        a, b, c = points_mm[triangles.T]
        # The sum of tetrahedra between each triangle and one point (the divergence theorem).
        volume_mm3 = abs(float(np.einsum("ij,ij", a, np.cross(b, c)))) / 6
        area_mm2 = float(mesh_surface_area(points_mm, triangles))
        points_lps_mm = level.geometry.to_lps_mm(points).astype(np.float32)
        return cls(points_lps_mm, triangles.astype(np.int32), volume_mm3, area_mm2)


@dataclass(frozen=True)
class _Lungs:
    """`depth_mm` is the distance of each voxel to the nearest one outside, on `grid`; `middle_mm` lies
    half-way between the outer sides of both lungs, in LPS along x."""

    depth_mm: np.ndarray
    grid: Geometry
    middle_mm: float

    @classmethod
    def of(cls, lungs: np.ndarray, grid: Geometry) -> Self:
        box = bounding_box(lungs)
        part = grid.part(box)
        corners = np.array(list(itertools.product(*((0, size - 1) for size in part.shape_zyx))))
        x_mm = part.to_lps_mm(corners)[:, 0]
        inside = np.ascontiguousarray(lungs[box] > 0)
        return cls(edt.edt(inside, part.spacing_mm, black_border=True), part, (x_mm.min() + x_mm.max()) / 2)

    def pleura_mm(self, points_lps_mm: np.ndarray) -> float:
        """The least distance of the points to where the lungs end, half a voxel before the first one
        outside."""
        indices = self.grid.to_index_zyx(points_lps_mm).T
        depths_mm = ndimage.map_coordinates(self.depth_mm, indices, order=1, mode="constant")
        return max(0.0, float(depths_mm.min()) - min(self.grid.spacing_mm) / 2)

    def side(self, x_lps_mm: float) -> str | None:
        off_mm = x_lps_mm - self.middle_mm
        return None if abs(off_mm) < MIDLINE_MM else "left" if off_mm > 0 else "right"


def _measure(
    label: int,
    level: LevelSet,
    surface: Surface,
    hu: np.ndarray,
    volume: Volume,
    config: SegmentConfig,
    lungs: _Lungs | None,
) -> NoduleMeasurement:
    """`hu` are those of the nodule's voxels."""
    inside = level.values > 0
    centre = vector(level.geometry.to_lps_mm(np.argwhere(inside).mean(axis=0)))
    axes = axial_axes(level)
    assert axes is not None  # some slice passes through the centre of a voxel
    solid = level.denser_than(config.solid_hu, volume)
    solid_axes = axial_axes(solid)
    mm3, mm2 = surface.volume_mm3, surface.area_mm2
    return NoduleMeasurement(
        label=label,
        centre_lps_mm=centre,
        voxels=hu.size,
        volume_mm3=mm3,
        surface_mm2=mm2,
        sphericity=(36 * math.pi * mm3**2) ** (1 / 3) / mm2,
        equivalent_diameter_mm=(6 * mm3 / math.pi) ** (1 / 3),
        longest_axial_diameter_mm=axes.long_mm,
        perpendicular_axial_diameter_mm=axes.short_mm,
        mean_axial_diameter_mm=axes.mean_mm,
        lung_rads_2022_diameter_mm=rounded(axes.mean_mm, "0.1"),
        fleischner_2017_diameter_mm=rounded(axes.mean_mm, "1"),
        axial_slice=axes.slice_index,
        long_axis_lps_mm=axes.long_lps_mm,
        short_axis_lps_mm=axes.short_lps_mm,
        mean_hu=float(hu.mean()),
        sd_hu=float(hu.std()),
        percentiles_hu={f"{of}": float(np.percentile(hu, of)) for of in PERCENTILES},
        mass_mg=mm3 * max(0.0, float(hu.mean()) + 1000) / 1000,
        solid_volume_mm3=mm3 * int((solid.values > 0).sum()) / int(inside.sum()),
        solid_longest_axial_diameter_mm=solid_axes.long_mm if solid_axes else None,
        pleura_mm=lungs.pleura_mm(surface.points_lps_mm) if lungs else None,
        side=lungs.side(centre[0]) if lungs else None,
        probability=float(level.values[inside].mean(dtype=np.float64)) + config.threshold,
        confidence=None,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value
