"""Metrics, against closed forms, published examples and plain counting."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import GeometryError
from lungseg.evaluate import metrics

SHAPE = (4, 5, 6)


def cube(low: int, side: int, size: int = 20) -> np.ndarray:
    mask = np.zeros((size,) * 3, np.uint8)
    mask[low : low + side, :10, :10] = 1
    return mask


def test_shifted_boxes_have_the_overlap_of_their_lengths() -> None:
    a, b = cube(0, 10), cube(4, 10)
    assert metrics.dice(a, b) == pytest.approx(0.6)
    assert metrics.iou(a, b) == pytest.approx(6 / 14)
    assert metrics.accuracy(a, b) == pytest.approx(1 - 800 / 8000)
    assert metrics.mean_iou(a, b) == pytest.approx((6 / 14 + (8000 - 1400) / (8000 - 600)) / 2)
    assert metrics.soft_dice(a, b.astype(np.float32)) == pytest.approx(0.6)


def test_mean_iou_gives_the_example_of_keras_documentation() -> None:
    truth, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert metrics.mean_iou(truth, predicted) == pytest.approx(0.33333334)
    # With sample_weight [0.3, 0.3, 0.3, 0.1] Keras gives 0.2381; a weight of 0 is our ignore.
    assert metrics.mean_iou(truth, predicted, np.array([0, 0, 0, 1])) == pytest.approx((1 / 3 + 0) / 2)


def test_cross_entropy_gives_the_example_of_keras_documentation() -> None:
    truth, probability = np.array([0, 1, 0, 0]), np.array([0.2689414, 0.9975274, 0.93086158, 0.047425873])
    expected = -np.mean(np.log([1 - 0.2689414, 0.9975274, 1 - 0.93086158, 1 - 0.047425873]))
    assert metrics.binary_cross_entropy(truth, probability) == pytest.approx(expected)


def test_cross_entropy_of_one_half_is_log_2_and_of_a_certain_error_is_finite() -> None:
    truth = cube(0, 10)
    half = np.full(truth.shape, 0.5, np.float32)
    assert metrics.binary_cross_entropy(truth, half) == pytest.approx(math.log(2))
    wrong = 1 - truth.astype(np.float32)
    assert metrics.binary_cross_entropy(truth, wrong) == pytest.approx(-math.log(1e-7))
    assert metrics.binary_cross_entropy(truth, truth.astype(np.float32)) == pytest.approx(1e-7, rel=1e-3)


@pytest.mark.parametrize("score", [metrics.dice, metrics.iou, metrics.soft_dice])
def test_two_empty_masks_agree_and_one_empty_mask_does_not(score: Callable[..., float]) -> None:
    empty, filled = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
    assert score(empty, empty) == 1
    assert score(empty, filled) == 0
    assert score(filled, empty) == 0
    assert score(filled, filled) == 1
    assert score(filled, empty, filled) == 1


def test_soft_dice_of_a_constant_has_its_closed_form() -> None:
    truth = np.zeros((10, 10, 10), bool)
    truth[:2] = True
    assert metrics.soft_dice(truth, np.full(truth.shape, 0.25)) == pytest.approx(2 * 50 / (250 + 200))


def test_sums_do_not_lose_voxels_of_a_large_scan() -> None:
    """float32 stops counting at 2**24 = 16.8 million."""
    probability = np.ones((20_000_000, 1, 1), np.float32)
    truth = np.zeros(probability.shape, bool)
    truth[:10_000_000] = True
    assert metrics.soft_dice(truth, probability) == pytest.approx(2 / 3, rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 100_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_metrics_agree_with_counting_voxel_by_voxel(seed: int, a: float, b: float, c: float) -> None:
    random = np.random.default_rng(seed)
    truth = (random.random(SHAPE) < a).astype(np.uint8)
    probability = random.random(SHAPE, np.float32)
    predicted = probability > b
    ignore = (random.random(SHAPE) < c / 2).astype(np.uint8)

    count = {(t, p): 0 for t in (0, 1) for p in (0, 1)}
    entropy, sum_p, sum_both = [], 0.0, 0.0
    for index in np.ndindex(SHAPE):
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

    assert metrics.dice(truth, predicted, ignore) == pytest.approx(ratio(2 * tp, 2 * tp + fp + fn))
    assert metrics.iou(truth, predicted, ignore) == pytest.approx(ratio(tp, tp + fp + fn))
    assert metrics.accuracy(truth, predicted, ignore) == pytest.approx(ratio(tp + tn, tp + tn + fp + fn))
    both = (ratio(tp, tp + fp + fn) + ratio(tn, tn + fp + fn)) / 2
    assert metrics.mean_iou(truth, predicted, ignore) == pytest.approx(both)
    soft = ratio(2 * sum_both, sum_p + tp + fn)
    assert metrics.soft_dice(truth, probability, ignore) == pytest.approx(soft, rel=1e-6)
    mean = sum(entropy) / len(entropy) if entropy else 0.0
    assert metrics.binary_cross_entropy(truth, probability, ignore) == pytest.approx(mean, rel=1e-6)


def test_each_nodule_is_scored_with_the_components_that_touch_it() -> None:
    reference = np.zeros((1, 1, 40), np.int32)
    predicted = np.zeros_like(reference)
    reference[..., 0:10], reference[..., 20:24], reference[..., 30:34] = 1, 2, 3
    predicted[..., 0:3], predicted[..., 6:12] = 5, 2  # 7 of 10 hit, 2 beside it, in two components
    predicted[..., 15:18] = 1  # touches nothing
    predicted[..., 32:38] = 4  # 2 of 4 hit, 4 beside it
    assert metrics.per_nodule_dice(reference, predicted) == pytest.approx([14 / 19, 0, 4 / 10])

    ignore = np.zeros_like(reference)
    ignore[..., 10:12] = ignore[..., 20:24] = 1
    assert metrics.per_nodule_dice(reference, predicted, ignore) == pytest.approx([14 / 17, 4 / 10])


def test_no_nodules_give_no_scores() -> None:
    empty = np.zeros(SHAPE, np.int32)
    assert metrics.per_nodule_dice(empty, np.ones(SHAPE, np.int32)) == []
    assert metrics.per_nodule_dice(np.ones(SHAPE, np.int32), empty) == [0.0]


def test_arrays_of_different_shapes_are_refused() -> None:
    a, slice_missing = np.ones((4, 5, 6)), np.ones((1, 5, 6))
    with pytest.raises(GeometryError, match="shape-mismatch"):
        metrics.dice(a, slice_missing)
    with pytest.raises(GeometryError, match="shape-mismatch"):
        metrics.soft_dice(a, a, slice_missing)
