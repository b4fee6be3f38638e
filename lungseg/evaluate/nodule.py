"""The numbers of one nodule: how it was found, how well it was outlined, and by whom else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import edt
import numpy as np
from scipy import ndimage
from scipy.spatial.distance import pdist

from lungseg.dataset.case import Nodule, Truth
from lungseg.evaluate import metrics
from lungseg.evaluate.kept import Box, Prediction, union
from lungseg.evaluate.matching import Matching, Overlap
from lungseg.evaluate.readers import ReaderDice, beside_readers
from lungseg.evaluate.surfaces import SurfaceDistances, surface_distances
from lungseg.scan.volume import Geometry

CROP_MM = 64.0
PLEURA_MM = 2.5
"""A nodule as near as this to where the lungs' mask ends is at the pleura: the mask is of blocks so large."""
TOLERANCES_MM = (1.0, 2.0)


@dataclass(frozen=True)
class Outline:
    """How well the component that stands for a nodule agrees with it; what cannot be measured without one is
    None. Errors are prediction minus truth, `volume_error_share` as a share of the truth's volume. Volumes
    and longest axial diameters are those of both masks."""

    iou: float = 0.0
    dice: float = 0.0
    hd95_mm: float | None = None
    mean_surface_mm: float | None = None
    surface_dice_1mm: float = 0.0
    surface_dice_2mm: float = 0.0
    predicted_volume_mm3: float = 0.0
    volume_error_mm3: float | None = None
    volume_error_share: float | None = None
    diameter_error_mm: float | None = None


@dataclass(frozen=True)
class NoduleScore:
    """One nodule. `component` is the label that stands for it, one to one, None where it is missed.

    `diameter_mm` is the readers' mean where they are known, else the longest axial one of the mask.
    `touching_dice` is the Dice with all components that touch it, `crop_dice` that in a cube of 64 mm around
    it. `pleural` is None where no lungs were found.
    """

    number: int
    nodule: Nodule
    volume_mm3: float
    mask_axial_diameter_mm: float
    pleural: bool | None
    component: int | None
    touching_dice: float
    crop_dice: float
    outline: Outline
    readers: ReaderDice | None

    @property
    def diameter_mm(self) -> float:
        readers = self.nodule.mean_reader_diameter_mm
        return self.mask_axial_diameter_mm if readers is None else readers

    def to_row(self) -> dict[str, Any]:
        """Every figure by name, for a table."""
        facts = asdict(self.nodule)
        x, y, z = facts.pop("centre_lps_mm")
        return {
            "nodule_id": facts.pop("nodule_id"),
            "x_lps_mm": x,
            "y_lps_mm": y,
            "z_lps_mm": z,
            "diameter_mm": self.diameter_mm,
            "mask_axial_diameter_mm": self.mask_axial_diameter_mm,
            **facts,
            "volume_mm3": self.volume_mm3,
            "pleural": self.pleural,
            "component": self.component,
            "touching_dice": self.touching_dice,
            "crop_dice": self.crop_dice,
            **asdict(self.outline),
            **(asdict(self.readers) if self.readers else dict.fromkeys(ReaderDice.__dataclass_fields__)),
        }


def score_nodules(
    truth: Truth, prediction: Prediction, box: Box, labels: np.ndarray, counted: Overlap, matching: Matching
) -> tuple[NoduleScore, ...]:
    """`labels` are the components in `box` of the scan's own grid, which holds them and all nodules."""
    part = truth.geometry.part(box)
    numbers = truth.numbers[box]
    places = ndimage.find_objects(np.maximum(numbers, 0))
    component_places = ndimage.find_objects(labels)
    component_of = dict(matching.pairs)
    scores = []
    for row, number in enumerate(counted.nodules.tolist()):
        place = places[number - 1]
        inside = numbers[place] == number
        component = component_of.get(number)
        volume_mm3 = float(np.count_nonzero(inside)) * math.prod(part.spacing_mm)
        outline, component_voxels = Outline(), 0
        if component is not None:
            column = int(np.searchsorted(counted.components, component))
            component_voxels = int(counted.component_voxels[column] + counted.ignored_voxels[column])
            both = union([place, component_places[component - 1]])
            mine, theirs = numbers[both] == number, labels[both] == component
            theirs[(numbers[both] < 0)] = False
            outline = _outline(mine, theirs, part)
        scores.append(
            NoduleScore(
                number=number,
                nodule=truth.nodules[number - 1],
                volume_mm3=volume_mm3,
                mask_axial_diameter_mm=mask_axial_diameter_mm(inside, part),
                pleural=_pleural(inside, part.part(place), prediction),
                component=component,
                touching_dice=touching_dice(counted, row),
                crop_dice=crop_dice(numbers, labels, place, part.spacing_mm),
                outline=outline,
                readers=beside_readers(truth, number, box, labels, component, component_voxels),
            )
        )
    return tuple(scores)


def diameters_mm(truth: Truth) -> list[tuple[Nodule, float]]:
    """Every nodule that has voxels, with the `diameter_mm` that its score has."""
    found = []
    places = ndimage.find_objects(np.maximum(truth.numbers, 0))
    for number, place in enumerate(places, 1):
        if place is None:
            continue
        nodule = truth.nodules[number - 1]
        diameter_mm = nodule.mean_reader_diameter_mm
        if diameter_mm is None:
            inside = truth.numbers[place] == number
            diameter_mm = mask_axial_diameter_mm(inside, truth.geometry.part(place))
        found.append((nodule, diameter_mm))
    return found


def _outline(mine: np.ndarray, theirs: np.ndarray, part: Geometry) -> Outline:
    voxel_mm3 = math.prod(part.spacing_mm)
    surfaces: SurfaceDistances = surface_distances(mine, theirs, part.spacing_mm)
    volume_mm3, predicted_mm3 = (float(np.count_nonzero(mask)) * voxel_mm3 for mask in (mine, theirs))
    diameters = [mask_axial_diameter_mm(mask, part) for mask in (theirs, mine)]
    within = [surfaces.dice(tolerance_mm) for tolerance_mm in TOLERANCES_MM]
    return Outline(
        iou=metrics.iou(mine, theirs),
        dice=metrics.dice(mine, theirs),
        hd95_mm=surfaces.hausdorff_mm(),
        mean_surface_mm=surfaces.mean_mm(),
        surface_dice_1mm=within[0],
        surface_dice_2mm=within[1],
        predicted_volume_mm3=predicted_mm3,
        volume_error_mm3=predicted_mm3 - volume_mm3,
        volume_error_share=(predicted_mm3 - volume_mm3) / volume_mm3,
        diameter_error_mm=diameters[0] - diameters[1],
    )


def touching_dice(counted: Overlap, row: int) -> float:
    """Dice of one nodule with all components that touch it; one that joins two counts in full for each."""
    touching = counted.shared[row] > 0
    voxels = counted.nodule_voxels[row] + counted.component_voxels[touching].sum()
    return float(2 * counted.shared[row].sum() / voxels)


def crop_dice(
    numbers: np.ndarray, labels: np.ndarray, place: Box, spacing_mm: tuple[float, float, float]
) -> float:
    """Dice in a cube of CROP_MM about the middle of the nodule's box, clipped at the border."""
    middles = [(side.start + side.stop) / 2 for side in place]
    halves = [CROP_MM / 2 / spacing for spacing in spacing_mm]
    cube = tuple(
        slice(max(0, round(middle - half)), round(middle + half))
        for middle, half in zip(middles, halves, strict=True)
    )
    return metrics.dice(numbers[cube] > 0, labels[cube] > 0, numbers[cube] < 0)


def _pleural(inside: np.ndarray, part: Geometry, prediction: Prediction) -> bool | None:
    """Whether the nodule `inside`, on its own box `part`, comes near to where the lungs end."""
    margins = [math.ceil(PLEURA_MM / spacing) + 1 for spacing in part.spacing_mm]
    around = part.part(tuple(slice(-m, n + m) for m, n in zip(margins, part.shape_zyx, strict=True)))
    lungs = prediction.lungs_on(around)
    if lungs is None:
        return None
    depth_mm = edt.edt(np.ascontiguousarray(lungs > 0), part.spacing_mm)
    own = tuple(slice(m, m + length) for m, length in zip(margins, inside.shape, strict=True))
    return bool(depth_mm[own][inside].min() <= PLEURA_MM)


def mask_axial_diameter_mm(inside: np.ndarray, geometry: Geometry) -> float:
    """Largest Feret diameter of a mask over the slices across the index axis nearest to the patient's long
    axis: by it truth, which is a mask, and prediction are compared alike. `predict` measures the surface
    between voxels instead (`longest_axial_diameter_mm`, see `axes`).

    It spans the midpoints of voxel faces, where a surface mesh has its vertices (PyRadiomics'
    Maximum2DDiameterSlice). Balls of 3 to 30 mm come out 0.2 to 0.8 voxels too long; between voxel centres
    small ones would come out as much too short, and a single voxel would have no width at all.
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
