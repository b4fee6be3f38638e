"""The 3D U-Net (Çiçek et al., 2016) with the window on Hounsfield units inside the network.

HU go in and one logit a voxel comes out, so training and every later use normalise alike.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from lungseg.config import ModelConfig


@keras.saving.register_keras_serializable("lungseg")
class HuWindow(keras.layers.Layer):
    """Map [low, high] HU to [-1, 1] and clip beyond; float32 in, the compute dtype out."""

    def __init__(self, low: float, high: float, **kwargs: Any) -> None:
        # bfloat16 resolves 8 HU at 1,000 HU: window first, cast after.
        super().__init__(autocast=False, **kwargs)
        self.low, self.high = low, high

    def call(self, volume_hu: tf.Tensor) -> tf.Tensor:
        scaled = (tf.cast(volume_hu, tf.float32) - self.low) * (2 / (self.high - self.low)) - 1
        return tf.cast(tf.clip_by_value(scaled, -1.0, 1.0), self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "low": self.low, "high": self.high}


def build_unet(config: ModelConfig) -> keras.Model:
    """float HU [n, z, y, x, 1] -> float32 logits of the same shape; sides are multiples of
    `config.total_stride`. Runs in the Keras dtype policy of the moment."""
    widths = [min(config.width * 2**level, config.max_width) for level in range(config.depth)]
    volume_hu = keras.Input((None, None, None, 1), dtype="float32", name="volume_hu")
    features = HuWindow(*config.hu_window, name="hu_window")(volume_hu)
    skips = []
    for level, width in enumerate(widths):
        if level:
            features = keras.layers.MaxPool3D(name=f"down{level}")(features)
        features = _block(features, width, config, f"encode{level}")
        skips.append(features)
    if config.dropout:
        features = keras.layers.SpatialDropout3D(config.dropout, name="dropout")(features)
    for level in reversed(range(config.depth - 1)):
        up = keras.layers.Conv3DTranspose(widths[level], 2, strides=2, name=f"up{level}")(features)
        joined = keras.layers.Concatenate(name=f"skip{level}")([skips[level], up])
        features = _block(joined, widths[level], config, f"decode{level}")
    # A nodule voxel is rare: starting at p = 0.01 saves the first hundred steps (Lin et al., 2017).
    rare = keras.initializers.Constant(-4.6)
    logits = keras.layers.Conv3D(1, 1, dtype="float32", bias_initializer=rare, name="logits")(features)
    return keras.Model(volume_hu, logits, name="unet")


def with_probability(model: keras.Model) -> keras.Model:
    """The network that people pull: HU in, probability out."""
    probability = keras.layers.Activation("sigmoid", dtype="float32", name="probability")(model.output)
    return keras.Model(model.input, probability, name="lungseg")


def _block(features: Any, width: int, config: ModelConfig, name: str) -> Any:
    for half in "ab":
        features = keras.layers.Conv3D(
            width, 3, padding="same", use_bias=config.norm == "none", name=f"{name}{half}_conv"
        )(features)
        norm = _norm(config.norm, width, f"{name}{half}_norm")
        features = norm(features) if norm else features
        features = keras.layers.LeakyReLU(0.01, name=f"{name}{half}_act")(features)
    return features


def _norm(kind: str, width: int, name: str) -> keras.layers.Layer | None:
    if kind == "none":
        return None
    if kind == "batch":
        return keras.layers.BatchNormalization(name=name)
    groups = -1 if kind == "instance" else min(8, width)
    return keras.layers.GroupNormalization(groups=groups, epsilon=1e-5, name=name)
