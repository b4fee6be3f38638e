"""Components: which voxels become nodules, and in which order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.segment.postprocess import components

MM = (1.0, 1.0, 1.0)
ALL = SegmentConfig(min_volume_mm3=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.3, 0.9), st.floats(0, 12))
def test_labels_agree_with_scipy_and_fall_in_volume(seed: int, threshold: float, minimum: float) -> None:
    probability = np.random.default_rng(seed).random((6, 7, 8), np.float32)
    spacing_mm = (2.0, 0.5, 1.5)
    config = SegmentConfig(threshold=threshold, min_volume_mm3=minimum)

    labels = components(probability, config, spacing_mm)

    reference, count = ndimage.label(probability > threshold, np.ones((3, 3, 3)))
    volumes_mm3 = [1.5 * np.count_nonzero(reference == label) for label in range(1, count + 1)]
    kept = [label for label, volume in enumerate(volumes_mm3, 1) if volume >= minimum]
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels > 0, np.isin(reference, kept))
    sizes = np.bincount(labels.ravel())[1:]
    assert sorted(sizes * 1.5) == sorted(volumes_mm3[label - 1] for label in kept)
    assert (np.diff(sizes) <= 0).all()
    for label in range(1, len(sizes) + 1):
        assert len(np.unique(reference[labels == label])) == 1


def test_voxels_at_the_threshold_are_background_and_corners_connect() -> None:
    probability = np.zeros((4, 4, 4), np.float32)
    probability[0, 0, 0] = probability[1, 1, 1] = 0.75
    probability[3, 3, 3] = 0.5
    labels = components(probability, ALL, MM)
    assert [tuple(int(i) for i in index) for index in np.argwhere(labels == 1)] == [(0, 0, 0), (1, 1, 1)]
    assert labels.max() == 1


def test_a_3_mm_ball_is_kept_by_default_and_half_of_it_goes() -> None:
    z, y, x = np.ogrid[-10:11, -10:11, -10:11]
    ball = (z**2 + y**2 + x**2) * 0.2**2 <= 1.5**2
    spacing_mm = (0.2, 0.2, 0.2)
    assert components(ball.astype(np.float32), SegmentConfig(), spacing_mm).max() == 1
    half = ball & (z < 0)
    assert components(half.astype(np.float32), SegmentConfig(), spacing_mm).max() == 0


def test_only_components_within_3_mm_of_the_lungs_stay() -> None:
    probability = np.zeros((9, 9, 30), np.float32)
    lungs = np.zeros(probability.shape, np.uint8)
    lungs[:, :, :5] = 1
    probability[1, 1, 2:4] = 1  # inside
    probability[4, 4, 10:12] = 1  # starts at x = 10: 6 voxels of 0.5 mm from the last lung voxel
    probability[7, 7, 11:13] = 1  # 7 voxels away

    spacing_mm = (5.0, 0.5, 0.5)
    labels = components(probability, ALL, spacing_mm, lungs)

    np.testing.assert_array_equal(np.unique(np.argwhere(labels)[:, 0]), [1, 4])
    everywhere = ALL.model_copy(update={"lungs_only": False})
    assert components(probability, everywhere, spacing_mm, lungs).max() == 3


def test_the_distance_to_the_lungs_is_in_mm_along_each_axis() -> None:
    probability = np.zeros((12, 3, 3), np.float32)
    probability[5, 1, 1] = 1
    for lung in (3, 7):
        lungs = np.zeros(probability.shape, np.uint8)
        lungs[lung] = 1
        assert components(probability, ALL, (1.5, 1.0, 1.0), lungs).max() == 1
        assert components(probability, ALL, (1.6, 1.0, 1.0), lungs).max() == 0


def test_nothing_above_the_threshold_gives_no_labels() -> None:
    labels = components(np.zeros((3, 4, 5), np.float32), SegmentConfig(), MM, np.ones((3, 4, 5), np.uint8))
    assert labels.shape == (3, 4, 5)
    assert not labels.any()
