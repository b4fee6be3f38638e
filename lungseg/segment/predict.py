"""Segment a new scan: a mask on the scan's own grid, and its nodules in patient coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lungseg.config import Recipe
from lungseg.scan.lungs import lung_mask
from lungseg.scan.resample import resample, resample_onto
from lungseg.scan.volume import Geometry, Volume
from lungseg.segment.postprocess import components
from lungseg.segment.quantify import NoduleMeasurement, measure
from lungseg.segment.sliding import Predictor, predict_volume


@dataclass(frozen=True)
class Segmentation:
    """`labels` is int32 [z, y, x] on `geometry`, the input's own grid: 0 background, 1 the largest nodule."""

    labels: np.ndarray
    geometry: Geometry
    nodules: tuple[NoduleMeasurement, ...]
    threshold: float
    lungs_found: bool
    warnings: tuple[str, ...] = ()


def segment(
    predict: Predictor, volume: Volume, recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> Segmentation:
    """Nodules of `volume`, found at the spacing that the network was trained at (`recipe.data.spacing_mm`).

    The probability is resampled linearly back onto the scan's grid and thresholded there, so that the
    mask has no stairs of the working grid. Where no lungs are found, the whole scan is searched; that, and
    values that are no HU, are warned of.
    """
    config = recipe.segment
    working = resample(volume, recipe.data.spacing_mm)
    lungs = lung_mask(working)
    lungs_found = bool(lungs.any())
    coarse = predict_volume(
        predict,
        working.volume_hu,
        config,
        lungs=lungs if lungs_found else None,
        progress=progress,
        multiple=recipe.model.total_stride,
    )
    probability = resample_onto(coarse, working.geometry, volume.geometry)
    own_lungs = resample_onto(lungs, working.geometry, volume.geometry) if lungs_found else None
    labels = components(probability, config, volume.geometry.spacing_mm, own_lungs)
    nodules = tuple(measure(labels, volume, probability))
    warnings = [f"the values are probably no HU: {volume.not_hu}"] if volume.not_hu else []
    if not lungs_found:
        warnings.append("no lungs were found, so the whole scan was searched: is it a chest CT?")
    return Segmentation(labels, volume.geometry, nodules, config.threshold, lungs_found, tuple(warnings))
