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
    shape = image.shape
    if config.flips:
        # -1 reads an axis backwards; a stride is cheaper than a conditional flip.
        z, y, x = tf.unstack(tf.where(draws[:3] < 0.5, -1, 1))
        image, mask = image[::z, ::y, ::x], mask[::z, ::y, ::x]
    if config.turns:
        turns = tf.cast(draws[3] * 4, tf.int32)
        image, mask = tf.image.rot90(image, turns), tf.image.rot90(mask, turns)
    image, mask = tf.ensure_shape(image, shape), tf.ensure_shape(mask, shape)
    mean = tf.reduce_mean(image)
    factor = 1 + config.contrast * (2 * draws[4] - 1)
    image = (image - mean) * factor + mean + config.brightness_hu * (2 * draws[5] - 1)
    if config.noise_hu:
        deviation = config.noise_hu * draws[6]
        image += deviation * tf.random.stateless_normal(tf.shape(image), tf.random.fold_in(stream, 1))
    return image, mask
