"""The numbers of one scan; each is named for what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from lungseg.config import SegmentConfig
from lungseg.dataset.stored_scans import StoredScan
from lungseg.evaluate.kept import Prediction, union
from lungseg.evaluate.marks import Detection, detect
from lungseg.evaluate.matching import Matching, match, overlap
from lungseg.evaluate.nodule import NoduleScore, score_nodules
from lungseg.scan.volume import bounding_box

EPSILON = 1e-7  # what Keras clips probabilities to before a logarithm


@dataclass(frozen=True)
class CaseResult:
    """One scan. None where a number has no meaning: nodule numbers of a scan without nodules.

    `dice`, `mean_iou` and `accuracy` compare the whole scan's final mask (thresholded, small and unsure
    components gone) with the truth on the scan's own grid, `working_grid_dice` on that of the network.
    `soft_dice`, `loss` (1 - soft_dice) and `cross_entropy` compare the probabilities there.
    `per_nodule_dice` is the mean over nodules of the Dice with the components that touch each, misses as
    0. `crop_dice` is the mean over nodules of the Dice in a cube of 64 mm around each. `false_positives`
    are components that touch neither nodule nor ignore region. `both_empty`: neither nodule nor
    component, where a Dice is a convention. Matchings are one to one, at an IoU above 0, 0.1 and 0.5;
    `rows` are the nodules. `voxels` counts those that count, in the truth, in the mask and in both.
    """

    case_id: str
    patient: int
    loss: float
    accuracy: float
    mean_iou: float
    dice: float
    working_grid_dice: float
    soft_dice: float
    cross_entropy: float
    nodules: int
    detected: int
    per_nodule_dice: float | None
    crop_dice: float | None
    components: int
    false_positives: int
    both_empty: bool
    voxels: Mapping[str, int]
    matching_any: Matching
    matching: Matching
    matching_half: Matching
    detection: Detection
    rows: tuple[NoduleScore, ...]

    def figures(self) -> dict[str, float | int | str | bool | None]:
        """The plain ones, by name."""
        found = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in found if isinstance(value, str | int | float | None)}


def evaluate_case(
    stored: StoredScan, prediction: Prediction, config: SegmentConfig, case_id: str = "", patient: int = 0
) -> CaseResult:
    """Score one scan; its mask is the one that `lungseg predict` makes, on the scan's own grid."""
    truth = stored.truth
    found = prediction.components(config)
    labels, covered = prediction.own_labels(found, truth.geometry, config.threshold)
    box = union([one for one in (covered, bounding_box(truth.numbers)) if one]) or (slice(0, 1),) * 3
    labels, numbers = labels[box], truth.numbers[box]
    counted = overlap(np.maximum(numbers, 0), labels, numbers < 0)
    matching_any = match(counted)
    rows = score_nodules(truth, prediction, box, labels, counted, matching_any)
    loss, cross_entropy = _of_probabilities(stored, prediction)
    voxels = {
        "counted": int(np.count_nonzero(truth.numbers >= 0)),
        "truth": int(counted.nodule_voxels.sum()),
        "predicted": int(counted.component_voxels.sum()),
        "both": int(counted.shared.sum()),
    }
    return CaseResult(
        case_id=case_id,
        patient=patient,
        loss=loss,
        soft_dice=1 - loss,
        cross_entropy=cross_entropy,
        **_of_masks(**voxels),
        working_grid_dice=_working_grid_dice(stored, prediction, found),
        voxels=voxels,
        nodules=len(rows),
        detected=int(counted.shared.any(axis=1).sum()),
        per_nodule_dice=mean_or_none([row.touching_dice for row in rows]),
        crop_dice=mean_or_none([row.crop_dice for row in rows]),
        components=len(counted.components),
        false_positives=int((~counted.shared.any(axis=0) & (counted.ignored_voxels == 0)).sum()),
        both_empty=not len(counted.nodules) and not len(counted.components),
        matching_any=matching_any,
        matching=match(counted, 0.1),
        matching_half=match(counted, 0.5),
        detection=detect(stored, prediction, config, rows),
        rows=rows,
    )


def _of_masks(counted: int, truth: int, predicted: int, both: int) -> dict[str, float]:
    """Of the whole masks, by their voxels. Two empty masks agree; the mean IoU is that of nodule and
    background, as Keras's MeanIoU(2)."""
    either = truth + predicted - both
    iou, background = (
        part / whole if whole else 1.0 for part, whole in ((both, either), (counted - either, counted - both))
    )
    return {
        "dice": 2 * both / (either + both) if either else 1.0,
        "mean_iou": (iou + background) / 2,
        "accuracy": 1 - (either - both) / counted if counted else 1.0,
    }


def _working_grid_dice(stored: StoredScan, prediction: Prediction, found: np.ndarray) -> float:
    numbers = stored.numbers[prediction.box_in(stored.volume.geometry)]
    predicted = (found > 0) & (numbers >= 0)
    both = np.count_nonzero(predicted & (numbers > 0))
    total = np.count_nonzero(predicted) + np.count_nonzero(stored.numbers > 0)
    return 2 * both / total if total else 1.0


def _of_probabilities(stored: StoredScan, prediction: Prediction) -> tuple[float, float]:
    """1 - 2 sum(p y) / (sum(p) + sum(y)), the soft Dice of probabilities p with the mask y, and the mean of
    -log(probability of the true class) in nats. What lies beyond the prediction has probability 0."""
    numbers = stored.numbers[prediction.box_in(stored.volume.geometry)]
    of_truth = prediction.probability[numbers > 0].astype(np.float64)
    values, silent = _histogram(prediction.probability, numbers == 0)
    nodule_voxels = np.count_nonzero(stored.numbers > 0)
    total = of_truth.sum() + values @ silent + nodule_voxels
    loss = 1 - 2 * of_truth.sum() / total if total else 0.0

    voxels = np.count_nonzero(stored.numbers >= 0)
    beyond = voxels - nodule_voxels - silent.sum()
    nats = (nodule_voxels - of_truth.size) * -math.log(EPSILON) + beyond * -math.log1p(-EPSILON)
    nats -= np.log(np.clip(of_truth, EPSILON, 1 - EPSILON)).sum()
    nats -= np.log1p(-np.clip(values, EPSILON, 1 - EPSILON)) @ silent
    return float(loss), float(nats / voxels) if voxels else 0.0


def _histogram(probability: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities that chosen voxels have, of all that float16 can say, as float64; and how many have
    each: sums over some ten thousand values take a part of the time that those over all voxels take."""
    counts = np.zeros(1 << 16, np.int64)
    for plane, here in zip(probability.view(np.uint16), chosen, strict=True):
        counts += np.bincount(plane[here], minlength=len(counts))
    bits = np.flatnonzero(counts)
    return bits.astype(np.uint16).view(np.float16).astype(np.float64), counts[bits]


def mean_or_none(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
