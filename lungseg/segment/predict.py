"""Segment a new scan: a mask on the scan's own grid, and its nodules in patient coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cc3d
import numpy as np

from lungseg.config import Recipe, SegmentConfig
from lungseg.scan.lungs import lung_mask
from lungseg.scan.resample import resample
from lungseg.scan.volume import Geometry, Volume
from lungseg.segment.candidates import find_candidates
from lungseg.segment.postprocess import components
from lungseg.segment.quantify import NoduleMeasurement, quantify
from lungseg.segment.sliding import Predictor, predict_volume


@dataclass(frozen=True)
class Segmentation:
    """`labels` is int32 [z, y, x] on `geometry`, the input's own grid: 0 background, 1 the largest nodule.

    `probability` (float32) and `lungs` (uint8, None where none were found) are on `working`, the grid that
    the network saw.
    """

    labels: np.ndarray
    geometry: Geometry
    nodules: tuple[NoduleMeasurement, ...]
    probability: np.ndarray
    working: Geometry
    config: SegmentConfig
    lungs: np.ndarray | None
    warnings: tuple[str, ...] = ()


def segment(
    predict: Predictor, volume: Volume, recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> Segmentation:
    """Nodules of `volume`, found at the spacing that the network was trained at (`recipe.data.spacing_mm`).

    They are the components of the probability on that working grid, as `evaluate` counts them; each of them
    is then taken to the scan's own grid, and measured, between voxels (see `quantify`). Where no lungs are
    found, the whole scan is searched; that, and values that are no HU, are warned of.
    """
    config = recipe.segment
    working = resample(volume, recipe.data.spacing_mm)
    mask = lung_mask(working)
    lungs = mask if mask.any() else None
    probability = predict_volume(
        predict,
        working.volume_hu,
        config,
        lungs=lungs,
        progress=progress,
        multiple=recipe.model.total_stride,
    )
    found = components(probability, config, working.geometry.spacing_mm, lungs)
    confidence = confidences(found, probability, working.geometry, config, lungs)
    labels, nodules = quantify(found, probability, working.geometry, volume, config, lungs, confidence)
    warnings = [f"the values are probably no HU: {volume.not_hu}"] if volume.not_hu else []
    if lungs is None:
        warnings.append("no lungs were found, so the whole scan was searched: is it a chest CT?")
    return Segmentation(
        labels,
        volume.geometry,
        tuple(nodules),
        probability,
        working.geometry,
        config,
        lungs,
        tuple(warnings),
    )


def confidences(
    labels: np.ndarray,
    probability: np.ndarray,
    geometry: Geometry,
    config: SegmentConfig,
    lungs: np.ndarray | None = None,
) -> dict[int, float]:
    """The highest score of the candidates in each of `labels`, components of `probability` [z, y, x] on the
    grid of `geometry`; one without a candidate has none.

    Only the surroundings of nodules are searched: to part what runs together anywhere takes many times as
    long.
    """
    low = cc3d.connected_components(probability > config.candidate_threshold, connectivity=26)
    touched = np.zeros(int(low.max(initial=0)) + 1, bool)
    touched[low[labels > 0]] = True
    touched[0] = False
    around = np.where(touched[low], probability, np.float32(0))
    candidate_labels, candidates = find_candidates(around, geometry, config, lungs)
    both = (labels > 0) & (candidate_labels > 0)
    pairs = np.unique(labels[both].astype(np.int64) * (len(candidates) + 1) + candidate_labels[both])
    best: dict[int, float] = {}
    for pair in pairs.tolist():
        label, candidate = divmod(pair, len(candidates) + 1)
        score = candidates[candidate - 1].score(config.candidate_score)
        best[label] = max(best.get(label, 0.0), score)
    return best
