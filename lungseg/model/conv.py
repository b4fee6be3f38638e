"""Convolutions of few channels, put so that oneDNN's faster kernels take them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from lungseg.model.precision import described_cpus


@keras.saving.register_keras_serializable("lungseg")
class Conv3D(keras.layers.Conv3D):
    """Keras' own, for sides that are multiples of the strides where padding is "same".

    oneDNN has no kernel for AVX2 that takes padding along z when it computes the gradient of a kernel: it
    copies the features for each of 27 offsets and multiplies matrices, which for few channels takes up to
    four times what the convolution forward does. Around features that are padded first it has one.

    AMX multiplies tiles of 16 outputs by 32 inputs, which few channels leave mostly empty. Neighbours along
    x taken together are a voxel of as many more channels, without a copy.
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        pads = self.padding == "same" and max(self.kernel_size) > 1
        if pads and not tf.config.get_visible_devices("GPU"):
            kernel = tf.convert_to_tensor(kernel)
            channels = inputs.shape[-1], self.filters
            if padding_first_pays(described_cpus(), inputs.dtype, max(channels)):
                return _padding_first(self.strides)(inputs, kernel)
            together = neighbours_together(described_cpus(), inputs.dtype, *channels)
            if self.kernel_size == (3, 3, 3) and self.strides == (1, 1, 1) and _divides(together, inputs):
                return _together(inputs, kernel, together)
        return super().convolution_op(inputs, kernel)


def padding_first_pays(cpuinfo: str, dtype: Any, channels: int) -> bool:
    """Whether the CPU that Linux describes so gains by it, with so many channels in or out.

    By an EPYC with AVX2, at 1 to 16 channels, 8 to 96 voxels a side, on one core and on two: the gradient
    took 0.3 to 1.05 of its time, 0.7 in the median. From 32 channels on it may take longer. Where there is
    AVX-512, oneDNN has kernels that take padding.
    """
    flags = cpuinfo.split()
    return channels <= 16 and dtype == "float32" and "avx2" in flags and "avx512f" not in flags


def neighbours_together(cpuinfo: str, dtype: Any, channels_in: int, channels_out: int) -> int:
    """How many voxels along x the CPU that Linux describes so should take as one, for a kernel of 3^3.

    By a Xeon with AMX, at 32 to 64 voxels a side, on one core: forward and both gradients took 0.63 of their
    time at 1 to 8 channels, 0.7 at 8 to 8, 0.9 at 16 to 8, 0.76 at 1 to 16, 0.84 at 4 to 4. More channels
    only compute more zeros, and in float32 there is nothing to gain.
    """
    if dtype != "bfloat16" or "amx_bf16" not in cpuinfo.split():
        return 1
    return max(1, min(4, (32 if channels_in == 1 else 16) // channels_out))


def _divides(together: int, features: tf.Tensor) -> bool:
    width = features.shape[3]
    return together > 1 and width is not None and width % together == 0


def _together(features: tf.Tensor, kernel: tf.Tensor, together: int) -> tf.Tensor:
    """The convolution of [n, z, y, x, c] as one of [n, z, y, x / together, together * c]."""
    *front, width, inputs = keras.ops.shape(features)
    outputs = kernel.shape[-1]
    # A row of the kernel for each voxel that is written: where it lies among those that are read.
    rows = [
        tf.pad(kernel, [(0, 0), (0, 0), (first, 3 * together - 3 - first), (0, 0), (0, 0)])
        for first in range(together - 1, 2 * together - 1)
    ]
    shaped = [tf.reshape(row, [3, 3, 3, together * inputs, outputs]) for row in rows]
    folded = tf.reshape(features, [*front, width // together, together * inputs])
    output = tf.nn.conv3d(folded, tf.concat(shaped, -1), [1] * 5, "SAME")
    return tf.reshape(output, [*front, width, outputs])


@functools.cache
def _padding_first(strides: tuple[int, int, int]) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    steps = [1, *strides, 1]

    @tf.custom_gradient
    def convolve(features: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradients(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            short = [size - stride for size, stride in zip(kernel.shape[:3], strides, strict=True)]
            around = [(0, 0), *((most // 2, most - most // 2) for most in short), (0, 0)]
            common = {"out_backprop": upstream, "strides": steps}
            return (
                tf.raw_ops.Conv3DBackpropInputV2(
                    input_sizes=tf.shape(features), filter=kernel, padding="SAME", **common
                ),
                tf.raw_ops.Conv3DBackpropFilterV2(
                    input=tf.pad(features, around), filter_sizes=kernel.shape, padding="VALID", **common
                ),
            )

        return tf.nn.conv3d(features, kernel, steps, "SAME"), gradients

    return convolve
