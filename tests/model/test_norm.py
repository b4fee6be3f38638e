"""Instance normalisation against its formula, forwards and backwards."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from lungseg.model.norm import InstanceNorm

SHAPE = (3, 4, 5, 6, 7)


def features(dtype: str = "float32") -> tf.Tensor:
    random = np.random.default_rng(0)
    means = random.normal(0, 2, (3, 1, 1, 1, 7))
    return tf.cast(random.normal(means, 3, SHAPE), dtype)


def layer(dtype: str = "float32") -> InstanceNorm:
    norm = InstanceNorm(dtype=dtype)
    norm.build(SHAPE)
    random = np.random.default_rng(1)
    norm.set_weights([random.uniform(0.5, 2, 7), random.normal(0, 1, 7)])
    return norm


def formula(values: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    mean, variance = tf.nn.moments(values, [1, 2, 3], keepdims=True)
    return (values - mean) * tf.math.rsqrt(variance + 1e-5) * gamma + beta


def test_each_channel_of_each_sample_is_normalised_scaled_and_shifted() -> None:
    values, norm = features(), layer()
    np.testing.assert_allclose(norm(values), formula(values, norm.gamma, norm.beta), atol=2e-5)


def test_gradients_are_those_of_the_formula() -> None:
    values, norm = features(), layer()
    upstream = tf.constant(np.random.default_rng(2).normal(0, 1, SHAPE), tf.float32)
    sources = [values, norm.gamma.value, norm.beta.value]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(values)
        ours, expected = norm(values), formula(values, norm.gamma, norm.beta)
    for found, wanted in zip(
        tape.gradient(ours, sources, upstream), tape.gradient(expected, sources, upstream), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)


def test_a_batch_of_unknown_size_is_normalised_alike() -> None:
    values, norm = features(), layer()
    unknown = tf.function(norm, input_signature=[tf.TensorSpec((None, None, None, None, 7))])
    np.testing.assert_allclose(unknown(values), norm(values), atol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_in_and_out_with_statistics_in_float32(dtype: str) -> None:
    norm = layer(dtype)
    values = features(norm.compute_dtype) + 100  # in bfloat16, a mean of 100 leaves steps of 0.5
    found = norm(values)
    assert found.dtype == norm.compute_dtype
    expected = formula(tf.cast(values, tf.float32), norm.gamma, norm.beta)
    np.testing.assert_allclose(tf.cast(found, tf.float32), expected, atol=0.04)


@pytest.mark.parametrize(("channels", "computed_in"), [(8, tf.float32), (16, tf.bfloat16), (24, tf.float32)])
def test_bfloat16_is_computed_in_where_the_processor_has_a_kernel_for_it(
    channels: int, computed_in: tf.DType
) -> None:
    norm = InstanceNorm(dtype="mixed_bfloat16")
    traced = tf.function(norm).get_concrete_function(tf.TensorSpec((2, 4, 4, 4, channels), tf.bfloat16))
    kernels = [op for op in traced.graph.get_operations() if op.type == "FusedBatchNormV3"]
    assert [op.inputs[0].dtype for op in kernels] == [computed_in] * 2
    assert traced.output_dtypes == tf.bfloat16


def test_it_is_saved_and_loaded_with_its_epsilon() -> None:
    norm = InstanceNorm(epsilon=0.1)
    assert keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(norm)).epsilon == 0.1
