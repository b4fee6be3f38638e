"""What needs no training: every dense voxel of the lungs. A model should do better."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.dataset.stored_scans import StoredScan
from lungseg.evaluate import metrics
from lungseg.evaluate.kept import Prediction
from lungseg.evaluate.matching import overlap
from lungseg.evaluate.nodule import crop_dice, touching_dice
from lungseg.scan.resample import resample_onto
from lungseg.segment.postprocess import components

BASELINE_HU = -400


def threshold_baseline(volume_hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """float32 [z, y, x], 1 where a voxel of the lungs is denser than -400 HU."""
    return ((volume_hu > BASELINE_HU) & (lungs != 0)).astype(np.float32)


def baseline_figures(
    stored: StoredScan, prediction: Prediction, config: SegmentConfig
) -> dict[str, list[float]]:
    """Its Dice of the scan and of each nodule, by the names of `CaseResult`, in the lungs of `prediction`."""
    truth, hu = stored.truth, stored.volume.volume_hu[prediction.box_in(stored.volume.geometry)]
    dense = threshold_baseline(
        hu, np.ones(hu.shape, np.uint8) if prediction.lungs is None else prediction.lungs
    )
    own = resample_onto(dense, prediction.geometry, truth.geometry)
    labels = components(own, config, truth.geometry.spacing_mm)
    nodules, ignore = np.maximum(truth.numbers, 0), truth.numbers < 0
    counted = overlap(nodules, labels, ignore)
    places = ndimage.find_objects(nodules)
    spacing_mm = truth.geometry.spacing_mm
    return {
        "dice": [metrics.dice(nodules, labels, ignore)],
        "per_nodule_dice": [touching_dice(counted, row) for row in range(len(counted.nodules))],
        "crop_dice": [crop_dice(truth.numbers, labels, places[n - 1], spacing_mm) for n in counted.nodules],
    }
