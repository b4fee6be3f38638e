"""Seeded augmentation inside the graph, the same for a sample wherever it is trained.

Each sample draws from its own stateless stream, keyed by (seed, step, row of the global batch), so a run
sees the same augmented patches on one device and on a hundred, and again after a resume.
"""

from __future__ import annotations

import tensorflow as tf

from lungseg.config import AugmentConfig


def augment(
    image_hu: tf.Tensor, mask: tf.Tensor, config: AugmentConfig, seed: int, step: tf.Tensor, rows: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """float32 HU and uint8 mask, both [n, z, y, x, 1]; `rows` int [n] are rows of the global batch.

    Geometry moves image and mask alike; intensity changes the image alone. Turns need square slices.
    """
    samples = [
        _one(image_hu[i], mask[i], config, _stream(seed, step, rows[i])) for i in range(image_hu.shape[0])
    ]
    images, masks = zip(*samples, strict=True)
    return tf.stack(images), tf.stack(masks)


def _stream(seed: int, step: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
    key = tf.random.fold_in(tf.constant([seed, 0x1D5], tf.int32), tf.cast(step, tf.int32))
    return tf.random.fold_in(key, tf.cast(row, tf.int32))


def _one(
    image: tf.Tensor, mask: tf.Tensor, config: AugmentConfig, stream: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    draws = tf.random.stateless_uniform([8], stream)
    signs = tf.where(draws[:3] < 0.5, -1, 1) if config.flips else tf.ones([3], tf.int32)
    if config.turns:
        # A turn by 90 degrees is a transposition, then a flip of y; by 270, of x; by 180, both flips.
        turns = tf.cast(draws[3] * 4, tf.int32)
        image, mask = (tf.where(turns % 2 == 1, tf.transpose(a, [0, 2, 1, 3]), a) for a in (image, mask))
        signs *= tf.gather([[1, 1, 1], [1, -1, 1], [1, -1, -1], [1, 1, -1]], turns)
    # -1 reads an axis backwards; strides and a choice cost less than conditionals in the graph.
    z, y, x = tf.unstack(signs)
    image, mask = (tf.ensure_shape(a[::z, ::y, ::x], a.shape) for a in (image, mask))
    contrast, brightness = config.contrast * (2 * draws[4] - 1), config.brightness_hu * (2 * draws[5] - 1)
    image += contrast * (image - tf.reduce_mean(image)) + brightness
    if config.noise_hu:
        deviation = config.noise_hu * draws[6]
        image += deviation * tf.random.stateless_normal(tf.shape(image), tf.random.fold_in(stream, 1))
    return image, mask
