"""Instance normalisation as fast as the hardware's batch normalisation."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("lungseg")
class InstanceNorm(keras.layers.Layer):
    """Each channel of each sample to mean 0 and variance 1, then scaled and shifted (Ulyanov et al., 2016).

    [n, z, y, x, c] in the compute dtype in and out; statistics, scale and shift in float32. The batch
    normalisation of one sample is its instance normalisation, and oneDNN and cuDNN have kernels for that:
    a training step through them takes a third of the time of separate means, squares and products.

    oneDNN's kernel for bfloat16 works on 16 channels at once. For other numbers of channels a plain loop
    takes its place, which is 2 to 13 times slower than the way through float32 and back; at multiples of 16
    the kernel takes half the time of that way.
    """

    def __init__(self, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon

    def build(self, shape: tuple[int | None, ...]) -> None:
        common: dict[str, Any] = {"shape": (shape[-1],), "dtype": "float32", "autocast": False}
        self.gamma = self.add_weight(**common, initializer="ones", name="gamma")
        self.beta = self.add_weight(**common, initializer="zeros", name="beta")

    def call(self, features: tf.Tensor) -> tf.Tensor:
        features = tf.cast(features, self.compute_dtype)
        n, z, y, x, channels = shape = keras.ops.shape(features)
        # Four dimensions: for five, TensorFlow 2.21 has no kernel of oneDNN's.
        flat = tf.reshape(features, [n, 1, z * y, x, channels])
        if _has_only_a_plain_loop(flat):
            flat = tf.cast(flat, tf.float32)
        scale, offset = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        empty = tf.zeros([0], tf.float32)

        def normal(sample: tf.Tensor) -> tf.Tensor:
            return tf.raw_ops.FusedBatchNormV3(
                x=sample,
                scale=scale,
                offset=offset,
                mean=empty,
                variance=empty,
                epsilon=self.epsilon,
                is_training=True,
            ).y

        known = isinstance(n, int)
        flat = tf.stack([normal(one) for one in tf.unstack(flat)]) if known else tf.map_fn(normal, flat)
        return tf.cast(tf.reshape(flat, shape), features.dtype)

    def compute_output_shape(self, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """So that no loop is traced for it, which takes most of the time that building a network does."""
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}


def _has_only_a_plain_loop(features: tf.Tensor) -> bool:
    return (
        features.dtype == tf.bfloat16
        and features.shape[-1] % 16 != 0
        and not tf.config.get_visible_devices("GPU")
    )
