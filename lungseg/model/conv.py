"""Convolutions whose gradients take oneDNN's faster kernel where there are two."""

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
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        pads = self.padding == "same" and max(self.kernel_size) > 1
        on_cpu = not tf.config.get_visible_devices("GPU")
        channels = max(inputs.shape[-1], self.filters)
        if pads and on_cpu and padding_first_pays(described_cpus(), inputs.dtype, channels):
            return _padding_first(self.strides)(inputs, tf.convert_to_tensor(kernel))
        return super().convolution_op(inputs, kernel)


def padding_first_pays(cpuinfo: str, dtype: Any, channels: int) -> bool:
    """Whether the CPU that Linux describes so gains by it, with so many channels in or out.

    By an EPYC with AVX2, at 1 to 16 channels, 8 to 96 voxels a side, on one core and on two: the gradient
    took 0.3 to 1.05 of its time, 0.7 in the median. From 32 channels on it may take longer. Where there is
    AVX-512, oneDNN has kernels that take padding.
    """
    flags = cpuinfo.split()
    return channels <= 16 and dtype == "float32" and "avx2" in flags and "avx512f" not in flags


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
