"""Metrics, against closed forms and plain counting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers.voxelwise import count_voxel_by_voxel
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


@pytest.mark.parametrize("score", [metrics.dice, metrics.iou])
def test_two_empty_masks_agree_and_one_empty_mask_does_not(score: Callable[..., float]) -> None:
    empty, filled = np.zeros(SHAPE, np.uint8), np.ones(SHAPE, np.uint8)
    assert score(empty, empty) == 1
    assert score(empty, filled) == 0
    assert score(filled, empty) == 0
    assert score(filled, filled) == 1
    assert score(filled, empty, filled) == 1


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 100_000), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_metrics_agree_with_counting_voxel_by_voxel(seed: int, a: float, b: float, c: float) -> None:
    random = np.random.default_rng(seed)
    truth = (random.random(SHAPE) < a).astype(np.uint8)
    probability = random.random(SHAPE, np.float32)
    predicted = probability > b
    ignore = (random.random(SHAPE) < c / 2).astype(np.uint8)

    expected = count_voxel_by_voxel(truth, probability, predicted, ignore)
    assert metrics.dice(truth, predicted, ignore) == pytest.approx(expected["dice"])
    assert metrics.iou(truth, predicted, ignore) == pytest.approx(expected["iou"])


def test_arrays_of_different_shapes_are_refused() -> None:
    a, slice_missing = np.ones((4, 5, 6)), np.ones((1, 5, 6))
    with pytest.raises(GeometryError, match="shape-mismatch"):
        metrics.dice(a, slice_missing)
    with pytest.raises(GeometryError, match="shape-mismatch"):
        metrics.iou(a, a, slice_missing)
