"""Resampling against scipy, rotation against scipy's, deformation against its own bound."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from lungseg.model.warp import control_shape, coordinates, displacement, rotation_and_scale, sample_at

SHAPE = (9, 10, 11)
MIDDLE = (np.array(SHAPE, np.float32) - 1) / 2


def scan() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(-500, 200, SHAPE).astype(np.float32), random.choice([0, 1], SHAPE).astype(np.uint8)


@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 4.0]))
@settings(max_examples=20, deadline=None)
def test_images_are_read_as_scipy_reads_them_linearly(seed: int, spread: float) -> None:
    image, mask = scan()
    random = np.random.default_rng(seed)
    points = np.indices(SHAPE, np.float32) + random.normal(0, spread, (3, *SHAPE)).astype(np.float32)
    found, labels = sample_at(tf.constant(image), tf.constant(mask), tf.constant(points))
    np.testing.assert_allclose(
        found.numpy(), scipy.ndimage.map_coordinates(image, points, order=1, mode="nearest"), atol=2e-3
    )
    nearest, sides = np.floor(points + 0.5).astype(int), np.array(SHAPE).reshape(3, 1, 1, 1)
    inside = ((nearest >= 0) & (nearest < sides)).all(0)
    expected = np.where(inside, mask[tuple(np.clip(nearest, 0, sides - 1))], 255)
    np.testing.assert_array_equal(labels.numpy(), expected)


def test_points_of_no_turn_are_the_voxels_themselves() -> None:
    still = rotation_and_scale(tf.zeros([3]), tf.constant(1.0))
    points = coordinates(SHAPE, still, tf.constant(MIDDLE), None)
    np.testing.assert_allclose(points.numpy(), np.indices(SHAPE), atol=1e-5)


@pytest.mark.parametrize("angles", [(0.3, 0, 0), (0, 0.3, 0), (0, 0, 0.3), (0.2, -0.4, 0.7)])
def test_a_turn_is_scipys_and_a_scale_divides_it(angles: tuple[float, float, float]) -> None:
    matrix = rotation_and_scale(tf.constant(angles, tf.float32), tf.constant(1.3)).numpy()
    # scipy's axes 0, 1, 2 stand for (z, y, x) here; its extrinsic turns follow one another as ours do.
    expected = Rotation.from_euler("xyz", angles).as_matrix() * 1.3
    np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_the_middle_of_the_output_reads_the_centre_it_is_given() -> None:
    matrix = rotation_and_scale(tf.constant([0.1, 0.2, 0.3]), tf.constant(1.1))
    points = coordinates((5, 5, 5), matrix, tf.constant([7.0, 8.0, 9.0]), None)
    np.testing.assert_allclose(points.numpy()[:, 2, 2, 2], [7, 8, 9], atol=1e-5)


@given(seed=st.integers(0, 1000), spacing=st.integers(4, 20))
@settings(max_examples=20, deadline=None)
def test_no_voxel_moves_further_than_a_control_point(seed: int, spacing: int) -> None:
    random = np.random.default_rng(seed)
    control = random.uniform(-1, 1, (3, *control_shape(SHAPE, spacing))).astype(np.float32)
    moved = displacement(tf.constant(control), SHAPE, spacing).numpy()
    assert moved.shape == (3, *SHAPE)
    assert np.abs(moved).max() <= 1 + 1e-5
    assert moved.std() > 0.01


@pytest.mark.parametrize("spacing", [4, 7, 16])
def test_control_points_on_a_line_give_that_line(spacing: int) -> None:
    """Cubic B-splines reproduce polynomials of the first degree: control point i lies at (i - 1) spacings."""
    shape = control_shape(SHAPE, spacing)
    control = np.stack([(np.indices(shape)[axis] - 1.0) * spacing for axis in range(3)])
    found = displacement(tf.constant(control, tf.float32), SHAPE, spacing)
    np.testing.assert_allclose(found.numpy(), np.indices(SHAPE), atol=1e-4)


def test_points_far_outside_read_the_border_and_are_ignored() -> None:
    image, mask = scan()
    wild = np.full((3, *SHAPE), 1e6, np.float32)
    found, labels = sample_at(tf.constant(image), tf.constant(mask), tf.constant(wild))
    assert np.isfinite(found.numpy()).all()
    assert (labels.numpy() == 255).all()
