"""From probabilities to candidates: places that may be a nodule, each with a score, for the FROC.

They begin at a lower probability than nodules do (`segment.candidate_threshold`), so that the curve reaches
the sensitivities that a higher threshold could never give back. Low down, neighbours run together: what is
too large for a nodule sheds its rim (`shed`), and what has several summits is cut between them (`split`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cc3d
import numpy as np
from scipy import ndimage
from skimage.morphology import local_maxima, reconstruction
from skimage.segmentation import watershed

from lungseg.config import SegmentConfig
from lungseg.config.fields import CandidateScore
from lungseg.scan.volume import Geometry, Vector
from lungseg.segment.postprocess import components

SADDLE_DEPTH = 0.15
"""How far the probability must fall between two summits to part them."""
LARGEST_MM = 60.0
"""Twice the largest nodule. What spans more, with a nodule in it, has vessels or half a lung in it too."""
RISE = 0.1
TOUCHING = np.ones((3, 3, 3))
SMALLEST_NODULE_MM3 = math.pi / 6 * 3**3


@dataclass(frozen=True)
class Candidate:
    """`centre_lps_mm` (x, y, z) is the centroid of its voxels weighted by their probability.

    `max`, `mean` and `p95` (the 95th percentile) are of its voxels' probabilities. `volume_weighted` is
    mean * v / (v + 14.1 mm3), v its volume: a speck ranks below a nodule of the same probability.
    """

    label: int
    centre_lps_mm: tuple[float, float, float]
    volume_mm3: float
    max: float
    mean: float
    p95: float
    volume_weighted: float

    def score(self, kind: CandidateScore) -> float:
        return float(getattr(self, kind))


def find_candidates(
    probability: np.ndarray, geometry: Geometry, config: SegmentConfig, lungs: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[Candidate, ...]]:
    """int32 labels [z, y, x] and the candidates in their order, from 1 on.

    `probability` is float [z, y, x] on the grid of `geometry`; small components and those beside the `lungs`
    go as in `components`.
    """
    low = config.model_copy(update={"threshold": config.candidate_threshold})
    labels = components(probability, low, geometry.spacing_mm, lungs)
    labels = split(shed(labels, probability, geometry.spacing_mm, low), probability)
    boxes = ndimage.find_objects(labels)
    return labels, tuple(
        _describe(label, box, labels, probability, geometry) for label, box in enumerate(boxes, start=1)
    )


def shed(
    labels: np.ndarray, probability: np.ndarray, spacing_mm: Vector, config: SegmentConfig
) -> np.ndarray:
    """`labels` where each component that spans more than LARGEST_MM has lost its least probable voxels, at a
    threshold that rises until its pieces span less, or nothing of it would be left. Pieces below
    `config.min_volume_mm3` go."""
    for threshold in np.arange(config.threshold + RISE, 1, RISE):
        large = np.zeros(int(labels.max(initial=0)) + 1, bool)
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            if box and _span_mm(box, spacing_mm) > LARGEST_MM:
                large[label] = probability[box].max(initial=0, where=labels[box] == label) > threshold
        if not large.any():
            break
        labels = labels.copy()
        labels[large[labels] & (probability <= threshold)] = 0
        pieces = cc3d.connected_components(labels, connectivity=26)
        voxels = cc3d.statistics(pieces)["voxel_counts"]
        kept = voxels * math.prod(spacing_mm) >= config.min_volume_mm3
        kept[0] = False
        labels = np.where(kept, np.cumsum(kept), 0).astype(np.int32)[pieces]
    return labels


def _span_mm(box: tuple[slice, ...], spacing_mm: Vector) -> float:
    sides = zip(box, spacing_mm, strict=True)
    return max((side.stop - side.start) * spacing for side, spacing in sides)


def split(labels: np.ndarray, probability: np.ndarray, saddle_depth: float = SADDLE_DEPTH) -> np.ndarray:
    """`labels` with each component cut along its valleys, numbered anew without gaps.

    A summit counts if one must go down by `saddle_depth` to come to a higher one (extended maxima: Soille,
    Morphological Image Analysis, 2003), so that noise parts nothing. Each summit floods its own basin
    (watershed, 26-connected) within the component.
    """
    result = labels.copy()
    free = int(labels.max(initial=0)) + 1
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        inside = labels[box] == label
        height = np.where(inside, probability[box], 0).astype(np.float32)
        one_summit = np.ptp(height[inside]) <= saddle_depth or _count(local_maxima(height, TOUCHING)) < 2
        if one_summit:  # as most, which the reconstruction would take ten times as long to say
            continue
        lowered = reconstruction(height - saddle_depth, height, footprint=TOUCHING)
        summits, count = ndimage.label(local_maxima(lowered, TOUCHING), TOUCHING)
        basins = watershed(-height, summits, TOUCHING, mask=inside)
        parts = result[box]
        parts[basins > 1] = basins[basins > 1] - 2 + free
        free += count - 1
    return result


def _count(mask: np.ndarray) -> int:
    return int(ndimage.label(mask, TOUCHING)[1])


def _describe(
    label: int, box: tuple[slice, ...], labels: np.ndarray, probability: np.ndarray, geometry: Geometry
) -> Candidate:
    inside = labels[box] == label
    p = probability[box][inside].astype(np.float64)
    centre_zyx = np.average(np.argwhere(inside), axis=0, weights=p) + [side.start for side in box]
    x, y, z = geometry.to_lps_mm(centre_zyx).tolist()
    volume_mm3 = p.size * math.prod(geometry.spacing_mm)
    mean = float(p.mean())
    return Candidate(
        label=label,
        centre_lps_mm=(x, y, z),
        volume_mm3=volume_mm3,
        max=float(p.max()),
        mean=mean,
        p95=float(np.percentile(p, 95)),
        volume_weighted=mean * volume_mm3 / (volume_mm3 + SMALLEST_NODULE_MM3),
    )
