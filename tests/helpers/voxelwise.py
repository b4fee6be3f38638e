"""Figures of a whole scan by their definitions, voxel by voxel."""

from __future__ import annotations

import math

import numpy as np


def count_voxel_by_voxel(
    truth: np.ndarray, probability: np.ndarray, predicted: np.ndarray, ignore: np.ndarray
) -> dict[str, float]:
    count = {(t, p): 0 for t in (0, 1) for p in (0, 1)}
    entropy, sum_p, sum_both = [], 0.0, 0.0
    for index in np.ndindex(truth.shape):
        if ignore[index]:
            continue
        count[int(truth[index]), int(predicted[index])] += 1
        p = float(probability[index])
        entropy.append(-math.log(min(max(p if truth[index] else 1 - p, 1e-7), 1 - 1e-7)))
        sum_p += p
        sum_both += p * int(truth[index])
    tp, fp, fn, tn = count[1, 1], count[0, 1], count[1, 0], count[0, 0]

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 1.0

    iou = ratio(tp, tp + fp + fn)
    return {
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "iou": iou,
        "mean_iou": (iou + ratio(tn, tn + fp + fn)) / 2,
        "accuracy": ratio(tp + tn, tp + tn + fp + fn),
        "soft_dice": ratio(2 * sum_both, sum_p + tp + fn),
        "cross_entropy": sum(entropy) / len(entropy) if entropy else 0.0,
    }
