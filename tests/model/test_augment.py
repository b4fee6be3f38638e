"""Augmentation depends on (seed, step, row) alone, and does what its settings say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from lungseg.config import AugmentConfig
from lungseg.model.augment import augment, blur

WINDOW = (-1000.0, 400.0)
NONE: dict[str, Any] = {
    "flips": False, "turns": False, "warp_share": 0.0, "blur_share": 0.0, "noise_hu": 0.0,
    "brightness_hu": 0.0, "contrast": 0.0, "gamma": 0.0,
}  # fmt: skip
GEOMETRY = AugmentConfig(**NONE | {"flips": True, "turns": True})


def run(
    image: np.ndarray, mask: np.ndarray, config: AugmentConfig, rows: Any, seed: int = 3, step: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    images, masks = augment(
        tf.constant(image, tf.float32), tf.constant(mask), config, WINDOW, seed, tf.constant(step, tf.int64),
        tf.constant(rows, tf.int64),
    )  # fmt: skip
    return images.numpy(), masks.numpy()


def batch(shape: tuple[int, int, int] = (6, 8, 8), rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    image = random.integers(-1000, 400, (rows, *shape, 1)).astype(np.float32)
    return image, random.choice([0, 1, 255], image.shape).astype(np.uint8)


def test_equal_seed_step_and_row_give_equal_samples_and_any_other_gives_others() -> None:
    image, mask = batch()
    first = run(image, mask, AugmentConfig(), range(4))
    for one, other in zip(first, run(image, mask, AugmentConfig(), range(4)), strict=True):
        np.testing.assert_array_equal(one, other)
    for changed in (
        {"rows": range(4), "seed": 4},
        {"rows": range(4), "step": 6},
        {"rows": range(4, 8)},
        {"rows": range(4), "step": 2**31 - 1},
    ):
        images, _ = run(image, mask, AugmentConfig(), **changed)
        assert all(not np.array_equal(images[i], first[0][i]) for i in range(4))


def test_replicas_that_share_a_batch_augment_as_one_device_would() -> None:
    image, mask = batch()
    whole = run(image, mask, AugmentConfig(), range(4))
    for share in (1, 2):
        parts = [
            run(image[i : i + share], mask[i : i + share], AugmentConfig(), range(i, i + share))
            for i in range(0, 4, share)
        ]
        for column in (0, 1):
            np.testing.assert_array_equal(np.concatenate([part[column] for part in parts]), whole[column])


def test_geometry_moves_image_and_mask_alike_and_keeps_every_voxel() -> None:
    _, mask = batch()
    image = mask.astype(np.float32) * 3 - 500
    images, masks = run(image, mask, GEOMETRY, range(4))
    np.testing.assert_array_equal(images, masks.astype(np.float32) * 3 - 500)
    for before, after in zip(image, images, strict=True):
        np.testing.assert_array_equal(np.sort(before, axis=None), np.sort(after, axis=None))
    assert not np.array_equal(images, image)


def test_without_any_setting_nothing_changes() -> None:
    image, mask = batch()
    images, masks = run(image, mask, AugmentConfig(**NONE), range(4))
    np.testing.assert_array_equal(images, image)
    np.testing.assert_array_equal(masks, mask)


def test_flips_and_turns_reach_all_their_sixteen_results_and_no_other() -> None:
    """2^3 flips times 4 turns in the axial plane are 32 draws, of which pairs coincide: a turn by 180
    degrees is both in-plane flips. 2 z-flips times the 8 symmetries of a square are 16."""
    cube = np.arange(4 * 3 * 3, dtype=np.float32).reshape(1, 4, 3, 3, 1)
    allowed = {
        np.rot90(flipped[:, :, ::x], k, (1, 2)).tobytes()
        for flipped in (cube[0], cube[0, ::-1])
        for x in (1, -1)
        for k in range(4)
    }
    rows = 256
    images, _ = run(np.repeat(cube, rows, 0), np.zeros((rows, 4, 3, 3, 1), np.uint8), GEOMETRY, range(rows))
    counts = np.unique([image.tobytes() for image in images], return_counts=True)[1]
    assert len(allowed) == 16
    assert {image.tobytes() for image in images} == allowed
    assert counts.max() < 3 * rows / 16  # each has 1/16 of the draws; 3/16 is 8 standard deviations away


def test_without_turns_slices_need_not_be_square() -> None:
    image, mask = batch((4, 6, 8))
    images, masks = run(image, mask, AugmentConfig(turns=False), range(4))
    assert images.shape == image.shape
    assert masks.shape == mask.shape


@pytest.mark.parametrize("limit", [5.0, 40.0])
def test_noise_is_normal_with_a_standard_deviation_up_to_its_setting(limit: float) -> None:
    rows = 64
    image = np.zeros((rows, 12, 12, 12, 1), np.float32)
    images, masks = run(
        image, image.astype(np.uint8), AugmentConfig(**NONE | {"noise_hu": limit}), range(rows)
    )
    deviations = images.std((1, 2, 3, 4))
    # 1,728 voxels estimate a deviation to 1.7 %.
    assert deviations.max() < 1.07 * limit
    assert deviations.max() > 0.9 * limit  # uniform draws: fails once in 800
    assert deviations.min() < 0.1 * limit
    assert abs(np.mean(images[:, ..., 0] / deviations[:, None, None, None])) < 0.02
    assert not masks.any()


def test_brightness_shifts_and_contrast_scales_about_the_mean_within_bounds() -> None:
    image, mask = batch(rows=64)
    brighter, _ = run(image, mask, AugmentConfig(**NONE | {"brightness_hu": 30.0}), range(64))
    shifts = brighter - image
    np.testing.assert_allclose(shifts.std((1, 2, 3, 4)), 0, atol=1e-3)
    means = shifts.mean((1, 2, 3, 4))
    assert np.abs(means).max() <= 30.001
    assert means.min() < -20
    assert means.max() > 20
    scaled, _ = run(image, mask, AugmentConfig(**NONE | {"contrast": 0.1}), range(64))
    factors = scaled.std((1, 2, 3, 4)) / image.std((1, 2, 3, 4))
    np.testing.assert_allclose(scaled.mean((1, 2, 3, 4)), image.mean((1, 2, 3, 4)), atol=1e-2)
    assert 0.9 - 1e-4 < factors.min() < 0.95
    assert 1.05 < factors.max() < 1.1 + 1e-4


def test_a_crop_lies_anywhere_in_the_patch_and_moves_image_and_mask_alike() -> None:
    place = np.arange(6 * 8 * 8).reshape(6, 8, 8, 1)
    rows = 600
    image = np.repeat(place[None].astype(np.float32), rows, 0)
    mask = np.repeat((place % 251)[None].astype(np.uint8), rows, 0)
    images, masks = run(image, mask, AugmentConfig(**NONE | {"crop_zyx": (4, 4, 4)}), range(rows))
    assert images.shape == masks.shape == (rows, 4, 4, 4, 1)
    np.testing.assert_array_equal(images.astype(int) % 251, masks)
    corners = np.unique(images[:, 0, 0, 0, 0], return_counts=True)
    expected = [place[z, y, x, 0] for z in range(3) for y in range(5) for x in range(5)]
    np.testing.assert_array_equal(corners[0], expected)
    assert corners[1].max() < 4 * rows / 75


def test_as_many_samples_are_warped_as_the_setting_says() -> None:
    image, mask = batch((8, 8, 8), rows=300)
    images, _ = run(image, mask, AugmentConfig(**NONE | {"warp_share": 0.3}), range(300))
    changed = (images != image).any((1, 2, 3, 4)).mean()
    assert 0.2 < changed < 0.4  # 4 standard deviations


def test_gamma_bends_the_window_between_its_ends() -> None:
    ramp = np.linspace(-1000, 400, 64, dtype=np.float32).reshape(1, 4, 4, 4, 1)
    image = np.repeat(ramp, 64, 0)
    images, _ = run(image, image.astype(np.uint8), AugmentConfig(**NONE | {"gamma": 0.5}), range(64))
    share, found = (image + 1000) / 1400, (images + 1000) / 1400
    middle = (slice(None), slice(1, 3))
    powers = np.log(found[middle]) / np.log(share[middle])
    np.testing.assert_allclose(powers.std((1, 2, 3, 4)), 0, atol=1e-3)
    logs = np.log(powers.mean((1, 2, 3, 4)))
    assert -0.501 < logs.min() < -0.35
    assert 0.35 < logs.max() < 0.501
    np.testing.assert_allclose(images.reshape(64, -1)[:, [0, -1]], [[-1000, 400]] * 64, atol=1.5)


@pytest.mark.parametrize("deviation", [0.1, 0.7, 1.0])
def test_blur_is_scipys_gaussian_filter(deviation: float) -> None:
    image = np.random.default_rng(0).normal(-500, 200, (9, 10, 11)).astype(np.float32)
    found = blur(tf.constant(image), tf.constant(deviation))
    expected = scipy.ndimage.gaussian_filter(image, deviation, mode="reflect", radius=4)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-2)


def test_a_compiled_step_augments_as_an_eager_one() -> None:
    image, mask = batch()
    compiled = tf.function(lambda i, m, s, r: augment(i, m, AugmentConfig(), WINDOW, 3, s, r))
    images, masks = compiled(
        tf.constant(image), tf.constant(mask), tf.constant(5, tf.int64), tf.range(4, dtype=tf.int64)
    )
    tf.config.run_functions_eagerly(True)
    try:
        eager = run(image, mask, AugmentConfig(), range(4))
    finally:
        tf.config.run_functions_eagerly(False)
    np.testing.assert_allclose(images.numpy(), eager[0], atol=1e-3)
    np.testing.assert_array_equal(masks.numpy(), eager[1])
