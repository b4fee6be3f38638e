"""Seeded augmentation inside the graph, the same for a sample wherever it is trained.

Each sample draws from its own stateless stream, keyed by (seed, step, row of the global batch), so a run
sees the same augmented patches on one device and on a hundred, and again after a resume. Geometry is one
resampling at most: a crop where nothing is warped, and mirrors and turns, which move voxels as they are.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import tensorflow as tf

from lungseg.config import AugmentConfig
from lungseg.model.warp import control_shape, coordinates, displacement, rotation_and_scale, sample_at

Draw = Literal["geometry", "control", "intensity", "noise"]
_STREAMS: dict[Draw, int] = {"geometry": 0, "control": 1, "intensity": 2, "noise": 3}


def augment(
    image_hu: tf.Tensor,
    mask: tf.Tensor,
    config: AugmentConfig,
    hu_window: tuple[float, float],
    seed: int,
    step: tf.Tensor,
    rows: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """float32 HU and uint8 mask, both [n, z, y, x, 1]; `rows` int [n] are rows of the global batch.

    Geometry moves image and mask alike; intensity changes the image alone. Turns need square slices.
    """
    samples = [
        _augment(image_hu[i], mask[i], config, hu_window, seed, step, rows[i])
        for i in range(image_hu.shape[0])
    ]
    images, masks = zip(*samples, strict=True)
    return tf.stack(images), tf.stack(masks)


@tf.function(autograph=False)
def _augment(
    image_hu: tf.Tensor,
    mask: tf.Tensor,
    config: AugmentConfig,
    hu_window: tuple[float, float],
    seed: int,
    step: tf.Tensor,
    row: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """One sample of [z, y, x, 1], so that all are traced once."""
    stream = _stream(seed, step, row)
    image, label = move(image_hu[..., 0], mask[..., 0], config, stream)
    image = change_intensity(image, config, hu_window, stream)
    return image[..., tf.newaxis], label[..., tf.newaxis]


def _stream(seed: int, step: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    # On the host, where the conditionals below are decided: a GPU would have to be waited for.
    with tf.device("CPU:0"):
        key = tf.random.fold_in(tf.constant([seed, 0x1D5], tf.int32), tf.cast(step, tf.int32))
        return tf.random.fold_in(key, tf.cast(row, tf.int32))


def _uniform(shape: tuple[int, ...], stream: tf.Tensor, draw: Draw, low: float = 0.0) -> tf.Tensor:
    """float32 from [low, 1)."""
    with tf.device("CPU:0"):
        return tf.random.stateless_uniform(shape, tf.random.fold_in(stream, _STREAMS[draw]), low, 1.0)


def move(
    image: tf.Tensor, mask: tf.Tensor, config: AugmentConfig, stream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Crop, warp, turn and mirror one sample, [z, y, x]."""
    draws = _uniform((12,), stream, "geometry")
    crop = config.crop_zyx or tuple(image.shape)
    room = np.array(image.shape) - crop
    corner = tf.cast(draws[:3] * (room + 1).astype(np.float32), tf.int32)

    def cut() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.slice(image, corner, crop), tf.slice(mask, corner, crop)

    def warped() -> tuple[tf.Tensor, tf.Tensor]:
        centre = tf.cast(corner, tf.float32) + (np.array(crop, np.float32) - 1) / 2
        return _warp(image, mask, config, crop, centre, 2 * draws[3:7] - 1, stream)

    if config.warp_share:
        image, mask = tf.cond(draws[7] < config.warp_share, warped, cut)
    elif crop != tuple(image.shape):
        image, mask = cut()
    return _turn_and_mirror(tf.ensure_shape(image, crop), tf.ensure_shape(mask, crop), config, draws[8:])


def _warp(
    image: tf.Tensor,
    mask: tf.Tensor,
    config: AugmentConfig,
    crop: tuple[int, int, int],
    centre: tf.Tensor,
    draws: tf.Tensor,
    stream: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`draws` float32 [4] from [-1, 1): three angles, and how much larger or smaller."""
    scale = tf.exp(draws[3] * math.log1p(config.scaling))
    matrix = rotation_and_scale(draws[:3] * math.radians(config.rotation_degrees), scale)
    shift = None
    if config.elastic:
        spacing = config.elastic_spacing
        control = _uniform((3, *control_shape(crop, spacing)), stream, "control", low=-1.0)
        shift = displacement(control * config.elastic * spacing, crop, spacing)
    return sample_at(image, mask, coordinates(crop, matrix, centre, shift))


def _turn_and_mirror(
    image: tf.Tensor, mask: tf.Tensor, config: AugmentConfig, draws: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    signs = tf.where(draws[:3] < 0.5, -1, 1) if config.flips else tf.ones([3], tf.int32)
    if config.turns:
        # A turn by 90 degrees is a transposition, then a flip of y; by 270, of x; by 180, both flips.
        turns = tf.cast(draws[3] * 4, tf.int32)
        image, mask = (tf.where(turns % 2 == 1, tf.transpose(a, [0, 2, 1]), a) for a in (image, mask))
        signs *= tf.gather([[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1]], turns)
    # -1 reads an axis backwards; strides and a choice cost less than conditionals in the graph.
    z, y, x = tf.unstack(signs)
    return tuple(tf.ensure_shape(a[::z, ::y, ::x], a.shape) for a in (image, mask))


def change_intensity(
    image_hu: tf.Tensor, config: AugmentConfig, hu_window: tuple[float, float], stream: tf.Tensor
) -> tf.Tensor:
    """Blur, contrast, brightness, gamma and noise of one sample, [z, y, x]; in this order, since a scanner's
    noise lies over all."""
    draws = _uniform((6,), stream, "intensity")
    even = 2 * draws - 1
    if config.blur_share:
        deviation = tf.maximum(draws[1] * config.blur_voxels, 0.1)
        image_hu = tf.cond(draws[0] < config.blur_share, lambda: blur(image_hu, deviation), lambda: image_hu)
    contrast, brightness = config.contrast * even[2], config.brightness_hu * even[3]
    if config.contrast or config.brightness_hu:
        image_hu += contrast * (image_hu - tf.reduce_mean(image_hu)) + brightness
    if config.gamma:
        low, high = hu_window
        share = tf.clip_by_value((image_hu - low) / (high - low), 0.0, 1.0)
        power = tf.exp(config.gamma * even[4])
        # A third of the time of tf.pow.
        image_hu = low + (high - low) * tf.exp(power * tf.math.log(tf.maximum(share, 1e-6)))
    if config.noise_hu:
        noise = tf.random.stateless_normal(tf.shape(image_hu), tf.random.fold_in(stream, _STREAMS["noise"]))
        image_hu += config.noise_hu * draws[5] * noise
    return image_hu


def blur(image: tf.Tensor, deviation_voxels: tf.Tensor) -> tf.Tensor:
    """[z, y, x] by a Gaussian of up to 2 voxels, cut at 4, the border mirrored."""
    offsets = tf.range(-4.0, 5.0)
    weights = tf.exp(-0.5 * (offsets / deviation_voxels) ** 2)
    weights = tf.unstack(weights / tf.reduce_sum(weights))
    for axis in range(3):
        side = image.shape[axis]
        padding = [[4, 4] if a == axis else [0, 0] for a in range(3)]
        padded = tf.pad(image, padding, "SYMMETRIC")
        parts = [padded[(*[slice(None)] * axis, slice(i, i + side))] for i in range(9)]
        image = tf.add_n([weight * part for weight, part in zip(weights, parts, strict=True)])
    return image
