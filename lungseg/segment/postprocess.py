"""From probabilities to separate nodules."""

from __future__ import annotations

import math

import cc3d
import numpy as np
from scipy import ndimage

from lungseg.config import SegmentConfig

LUNG_MARGIN_MM = 3.0


def components(
    probability: np.ndarray,
    config: SegmentConfig,
    spacing_mm: tuple[float, float, float],
    lungs: np.ndarray | None = None,
) -> np.ndarray:
    """int32 labels [z, y, x], 1 the largest: 26-connected voxels with probability above `config.threshold`.

    Components below `config.min_volume_mm3` go. So do, with `lungs` (nonzero inside) and `config.lungs_only`,
    those with no voxel within LUNG_MARGIN_MM of the lungs: a classical lung mask ends at the pleura, and
    nodules attached to it may lie outside. `spacing_mm` is (z, y, x).
    """
    found = cc3d.connected_components(probability > config.threshold, connectivity=26)
    inside = np.flatnonzero(found)  # a small part: whatever is done to all voxels costs many times as much
    of_voxels = found.ravel()[inside]
    voxels = np.bincount(of_voxels, minlength=1)
    keep = voxels * math.prod(spacing_mm) >= config.min_volume_mm3
    keep[0] = False
    if lungs is not None and config.lungs_only:
        keep &= _near_lungs(found, keep, lungs, spacing_mm)

    kept = np.flatnonzero(keep)
    ranked = kept[np.argsort(-voxels[kept], kind="stable")]
    renumbered = np.zeros(len(voxels), np.int32)
    renumbered[ranked] = np.arange(1, len(ranked) + 1)
    labels = np.zeros(found.shape, np.int32)
    labels.ravel()[inside] = renumbered[of_voxels]
    return labels


def _near_lungs(
    labels: np.ndarray, candidates: np.ndarray, lungs: np.ndarray, spacing_mm: tuple[float, float, float]
) -> np.ndarray:
    """bool per label: whether a candidate component comes within LUNG_MARGIN_MM of the lungs."""
    near = np.zeros(len(candidates), bool)
    near[np.unique(labels[(lungs > 0) & (labels > 0)])] = True
    # Most components lie in the lungs; only the few others need a distance, and only around themselves.
    boxes = ndimage.find_objects(labels)
    margins = [math.ceil(LUNG_MARGIN_MM / spacing) for spacing in spacing_mm]
    for label in np.flatnonzero(candidates & ~near):
        box = tuple(
            slice(max(0, side.start - margin), side.stop + margin)
            for side, margin in zip(boxes[label - 1], margins, strict=True)
        )
        distance_mm = ndimage.distance_transform_edt(labels[box] != label, sampling=spacing_mm)
        near[label] = bool((distance_mm[lungs[box] > 0] <= LUNG_MARGIN_MM).any())
    return near
