"""Convolutions give what Keras' own give, forwards and backwards, by whichever kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from lungseg.model import conv
from lungseg.model.conv import Conv3D, neighbours_together, padding_first_pays

AVX2 = "processor : 0\nvendor_id : AuthenticAMD\nflags : fpu sse avx avx2 fma\n"
AVX512 = AVX2.replace("fma", "fma avx512f avx512_bf16")
AMX = AVX512.replace("avx512_bf16", "avx512_bf16 amx_bf16 amx_tile")


def pair(width: int, strides: int, channels: int) -> tuple[keras.layers.Layer, keras.layers.Layer]:
    """Ours and Keras', with the same weights."""
    layers = [
        kind(width, 3, strides, padding="same", dtype="float32") for kind in (Conv3D, keras.layers.Conv3D)
    ]
    for layer in layers:
        layer.build((None, None, None, None, channels))
    layers[1].set_weights(layers[0].get_weights())
    return layers[0], layers[1]


def gradients(layer: keras.layers.Layer, features: tf.Tensor) -> list[Any]:
    with tf.GradientTape() as tape:
        tape.watch(features)
        output = layer(features)
        loss = tf.reduce_sum(
            output * tf.sin(tf.reshape(tf.range(tf.size(output), dtype=tf.float32), output.shape))
        )
    return [output, *tape.gradient(loss, [features, *(weight.value for weight in layer.weights)])]


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize(("shape", "strides", "width"), [
    ((2, 5, 6, 7, 3), 1, 4), ((1, 8, 4, 6, 1), 2, 8), ((3, 3, 3, 3, 16), 1, 16),
])  # fmt: skip
def test_output_and_gradients_are_those_of_keras(
    shape: tuple[int, ...], strides: int, width: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "padding_first_pays", lambda *_: pays)
    features = tf.constant(np.random.default_rng(0).normal(0, 1, shape), tf.float32)
    ours, theirs = pair(width, strides, shape[-1])
    for found, wanted in zip(gradients(ours, features), gradients(theirs, features), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("together", [2, 3, 4])
@pytest.mark.parametrize(("channels", "width"), [(1, 8), (8, 8), (5, 3)])
def test_neighbours_taken_together_give_what_each_gives(
    channels: int, width: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "padding_first_pays", lambda *_: False)
    monkeypatch.setattr(conv, "neighbours_together", lambda *_: together)
    features = tf.constant(np.random.default_rng(0).normal(0, 1, (2, 3, 5, 12, channels)), tf.float32)
    ours, theirs = pair(width, 1, channels)
    for found, wanted in zip(gradients(ours, features), gradients(theirs, features), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4, rtol=1e-4)
    traced = tf.function(ours).get_concrete_function(tf.TensorSpec(features.shape))
    (operation,) = [one for one in traced.graph.get_operations() if one.type == "Conv3D"]
    assert operation.inputs[0].shape == (2, 3, 5, 12 // together, together * channels)


@pytest.mark.parametrize(
    ("size", "strides", "side"), [(1, 1, 4), (5, 1, 4), (3, 2, 4), (3, 1, 5), (3, 1, None)]
)
def test_neighbours_stay_apart_where_they_do_not_fit(
    size: int, strides: int, side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "padding_first_pays", lambda *_: False)
    monkeypatch.setattr(conv, "neighbours_together", lambda *_: 2)
    monkeypatch.setattr(conv, "_together", None)
    layer = Conv3D(8, size, strides, padding="same")
    traced = tf.function(layer).get_concrete_function(tf.TensorSpec((1, 4, 4, side, 8)))
    assert traced.output_shapes[-1] == 8


@pytest.mark.parametrize(("dtype", "channels_in", "channels_out", "described", "wanted"), [
    ("bfloat16", 8, 8, AMX, 2), ("bfloat16", 16, 8, AMX, 2), ("bfloat16", 1, 8, AMX, 4),
    ("bfloat16", 1, 16, AMX, 2), ("bfloat16", 4, 4, AMX, 4), ("bfloat16", 16, 16, AMX, 1),
    ("bfloat16", 8, 64, AMX, 1), ("float32", 8, 8, AMX, 1), ("bfloat16", 8, 8, AVX512, 1),
])  # fmt: skip
def test_amx_takes_neighbours_of_few_channels_together(
    dtype: str, channels_in: int, channels_out: int, described: str, wanted: int
) -> None:
    assert neighbours_together(described, tf.as_dtype(dtype), channels_in, channels_out) == wanted


@pytest.mark.parametrize(("described", "padding"), [(AVX2, b"VALID"), (AVX512, b"SAME")])
def test_the_cpu_chooses_the_kernel(described: str, padding: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "described_cpus", lambda: described)
    layer, _ = pair(8, 1, 8)
    graph = tf.function(lambda features: gradients(layer, features)).get_concrete_function(
        tf.TensorSpec((1, 4, 4, 4, 8))
    )
    (operation,) = [one for one in graph.graph.get_operations() if one.type == "Conv3DBackpropFilterV2"]
    assert operation.get_attr("padding") == padding


@pytest.mark.parametrize(("dtype", "channels", "described", "pays"), [
    ("float32", 16, AVX2, True), ("float32", 1, AVX2, True), ("float32", 17, AVX2, False),
    ("bfloat16", 8, AVX2, False), ("float32", 8, AVX512, False), ("float32", 8, "", False),
])  # fmt: skip
def test_padding_first_pays_for_few_channels_on_cpus_with_avx2_alone(
    dtype: str, channels: int, described: str, pays: bool
) -> None:
    assert padding_first_pays(described, tf.as_dtype(dtype), channels) == pays


def test_other_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "described_cpus", lambda: AVX2)
    monkeypatch.setattr(conv, "_padding_first", None)
    for channels, width, size, padding in (
        (32, 8, 3, "same"), (8, 32, 3, "same"), (8, 8, 1, "same"), (8, 8, 3, "valid"),
    ):  # fmt: skip
        layer = Conv3D(width, size, padding=padding, dtype="float32")
        assert layer(tf.zeros((1, 4, 4, 4, channels))).shape[-1] == width


GRADIENTS = """
import lungseg
import tensorflow as tf

features, kernel = tf.ones((1, 4, 4, 4, 8)), tf.Variable(tf.ones((3, 3, 3, 8, 8)))
for _ in range(3):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.nn.conv3d(features, kernel, [1] * 5, "SAME"))
    tape.gradient(loss, kernel)
"""


def test_a_gradient_is_planned_once() -> None:
    """By what oneDNN says of itself."""
    said = subprocess.run(
        [sys.executable, "-c", GRADIENTS],
        env=os.environ | {"ONEDNN_VERBOSE": "2"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line for line in said.splitlines() if "backward_weights" in line]
    assert [sum(word in line for line in lines) for word in (",create:", ",exec,")] == [1, 3]
