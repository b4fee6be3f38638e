"""Agreement of a segmentation with its reference: pure functions on arrays of one grid.

Masks are nonzero (or True) inside. Voxels where `ignore` is nonzero count nowhere. Two empty masks agree
fully (1.0), an empty and a filled one not at all (0.0): a scan without nodules must not reward a prediction.
Both raise GeometryError("shape-mismatch") if the arrays are not of one shape.
"""

from __future__ import annotations

import numpy as np

from lungseg.errors import GeometryError


def dice(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """2 |A and B| / (|A| + |B|) of two masks (Dice, 1945)."""
    both, either = _overlap(reference, predicted, ignore)
    return 2 * both / (either + both) if either else 1.0


def iou(reference: np.ndarray, predicted: np.ndarray, ignore: np.ndarray | None = None) -> float:
    """|A and B| / |A or B| of two masks (Jaccard, 1901)."""
    both, either = _overlap(reference, predicted, ignore)
    return both / either if either else 1.0


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
