"""Agreement of a segmentation with its reference: pure functions on arrays of one grid.

Masks are nonzero (or True) inside. Voxels where `ignore` is nonzero count nowhere. Two empty masks agree
fully (1.0), an empty and a filled one not at all (0.0): a scan without nodules must not reward a prediction.
Sums run in float64, since float32 loses voxels in a whole scan.
All raise GeometryError("shape-mismatch") if the arrays are not of one shape.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import GeometryError

EPSILON = 1e-7  # what Keras clips probabilities to before a logarithm


def dice(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """2 |A and B| / (|A| + |B|) of two masks (Dice, 1945)."""
    both, either = _overlap(reference, predicted, ignore)
    return 2 * both / (either + both) if either else 1.0


def iou(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """|A and B| / |A or B| of two masks (Jaccard, 1901)."""
    both, either = _overlap(reference, predicted, ignore)
    return both / either if either else 1.0


def mean_iou(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Mean of the IoU of nodule and of background, as Keras's MeanIoU(2) on thresholded masks.

    Nearly all of a scan is background, so a scan where everything is missed still scores about 0.5.
    """
    background = iou(~reference.astype(bool), ~predicted.astype(bool), ignore)
    return (iou(reference, predicted, ignore) + background) / 2


def accuracy(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """Share of voxels on which two masks agree; 1.0 if all voxels are ignored."""
    a, b = _counted(reference.astype(bool), predicted.astype(bool), ignore)
    return float((a == b).mean()) if a.size else 1.0


def soft_dice(reference: np.ndarray, probability: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """2 sum(p y) / (sum(p) + sum(y)), the Dice of probabilities p with a mask y, without smoothing."""
    y, p = _counted(reference.astype(bool), probability, ignore)
    total = p.sum(dtype=np.float64) + y.sum()
    return float(2 * p[y].sum(dtype=np.float64) / total) if total else 1.0


def binary_cross_entropy(
    reference: np.ndarray, probability: np.ndarray, ignore: np.ndarray | None = None
) -> float:
    """Mean of -log(probability of the true class) in nats, clipped to [EPSILON, 1 - EPSILON] as Keras does.

    0.0 if all voxels are ignored.
    """
    y, p = _counted(reference.astype(bool), probability, ignore)
    p = p.astype(np.float64)
    of_truth = np.clip(np.where(y, p, 1 - p), EPSILON, 1 - EPSILON)
    return float(-np.log(of_truth).mean()) if y.size else 0.0


def per_nodule_dice(
    reference_labels: np.ndarray, predicted_labels: np.ndarray, ignore: np.ndarray | None = None
) -> list[float]:
    """Dice of each reference nodule with all predicted components that touch it, in order of its label.

    Labels are integers, 0 the background. A nodule that no component touches scores 0.0; one that is
    ignored altogether is left out. A component that joins two nodules counts in full for each of them.
    """
    reference, predicted = _counted(reference_labels, predicted_labels, ignore)
    reference_voxels = np.bincount(reference)
    predicted_voxels = np.bincount(predicted)
    both = (reference > 0) & (predicted > 0)
    (nodule, component), shared = np.unique(
        np.stack([reference[both], predicted[both]]), axis=1, return_counts=True
    )
    scores = []
    for label in np.flatnonzero(reference_voxels[1:]) + 1:
        mine = nodule == label
        voxels = reference_voxels[label] + predicted_voxels[component[mine]].sum()
        scores.append(float(2 * shared[mine].sum() / voxels))
    return scores


def _overlap(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None) -> tuple[int, int]:
    """Voxels in both masks, and voxels in either."""
    a, b = _counted(reference.astype(bool), predicted.astype(bool), ignore)
    return int(np.count_nonzero(a & b)), int(np.count_nonzero(a | b))


def _counted(
    reference: np.ndarray, other: np.ndarray, ignore: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The voxels that count, each array in one row."""
    # NumPy would broadcast a missing slice over the whole scan without a word.
    shapes = [array.shape for array in (reference, other, ignore) if array is not None]
    if len(set(shapes)) > 1:
        raise GeometryError("shape-mismatch", shapes=shapes, remedy="give arrays on one grid")
    if ignore is None:
        return reference.ravel(), other.ravel()
    counts = ignore == 0
    return reference[counts], other[counts]
