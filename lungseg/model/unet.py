"""3D U-Nets: Hounsfield units in, logits out.

The window on HU is part of the network, so that training and every later use normalise alike.

"unet" is the plain network (Çiçek et al., 2016), "resenc" has residual blocks in the encoder and one
convolution a level in the decoder (nnU-Net's ResEnc; Isensee et al., 2024).
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from lungseg.config import ModelConfig
from lungseg.model.conv import Conv3D
from lungseg.model.norm import InstanceNorm

_HE = "he_normal"
"""How kernels begin, as in nnU-Net (He et al., 2015). Keras' default draws them smaller, the first one to a
fourth. Behind a norm the scale of a kernel does not matter to its output, but a smaller one turns faster: it
is as if the learning rate were higher."""


@keras.saving.register_keras_serializable("lungseg")
class Balanced(keras.initializers.HeNormal):
    """He's, less its mean, for the last layer. What goes into it comes from an activation, and is positive on
    average. A kernel with a mean would make a constant of that, and the network would begin anywhere between
    "all is nodule" and "nothing is"."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kernel = super().__call__(*args, **kwargs)
        return kernel - keras.ops.mean(kernel)


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
    """float HU [n, z, y, x, 1] -> float32 logits of the same shape. Sides are multiples of
    `config.total_stride`. The Keras dtype policy of the moment is the precision.

    A plain network has one output. With deep supervision there is a list: the logits, then those at 1/2,
    1/4, … of the sides. An ensemble's list holds all outputs of the first member, then all of the second, …
    """
    volume_hu = keras.Input((None, None, None, 1), dtype="float32", name="volume_hu")
    windowed = HuWindow(*config.hu_window, name="hu_window")(volume_hu)
    # A lone network's layers have plain names.
    prefixes = [f"member{number}_" for number in range(config.members)] if config.members > 1 else [""]
    outputs = [output for prefix in prefixes for output in _member(windowed, config, prefix)]
    return keras.Model(volume_hu, outputs if len(outputs) > 1 else outputs[0], name=config.architecture)


def by_member(outputs: Any, config: ModelConfig) -> list[list[Any]]:
    """What `build_unet`'s network gave, for each member: logits, then those of coarser levels."""
    flat, each = tf.nest.flatten(outputs), config.deep_supervision + 1
    return [flat[first : first + each] for first in range(0, len(flat), each)]


def with_probability(model: keras.Model, config: ModelConfig) -> keras.Model:
    """The network that people pull: HU in, probability out, an ensemble's being the members' mean."""
    members = by_member(model.outputs, config)
    names = (
        [f"probability{number}" for number in range(len(members))] if len(members) > 1 else ["probability"]
    )
    each = [
        keras.layers.Activation("sigmoid", dtype="float32", name=name)(logits)
        for name, (logits, *_) in zip(names, members, strict=True)
    ]
    mean = keras.layers.Average(dtype="float32", name="probability")(each) if len(each) > 1 else each[0]
    return keras.Model(model.input, mean, name="lungseg")


def _member(windowed: Any, config: ModelConfig, prefix: str) -> list[Any]:
    """One U-Net: its logits, and the coarser ones that deep supervision asks for."""
    widths = [min(config.width * 2**level, config.max_width) for level in range(config.depth)]
    features, skips = windowed, []
    for level, width in enumerate(widths):
        features = _encode(features, level, width, config, prefix)
        skips.append(features)
    if config.dropout:
        features = keras.layers.SpatialDropout3D(config.dropout, name=f"{prefix}dropout")(features)
    outputs: list[Any] = []
    for level in reversed(range(config.depth - 1)):
        up = keras.layers.Conv3DTranspose(
            widths[level], 2, strides=2, kernel_initializer=_HE, name=f"{prefix}up{level}"
        )(features)
        features = keras.layers.Concatenate(name=f"{prefix}skip{level}")([skips[level], up])
        for part in "ab" if config.architecture == "unet" else "a":
            features = _conv(features, widths[level], config, f"{prefix}decode{level}{part}")
        if level <= config.deep_supervision:
            outputs.insert(0, _head(features, f"{prefix}deep_logits{level}" if level else f"{prefix}logits"))
    return outputs


def _encode(features: Any, level: int, width: int, config: ModelConfig, prefix: str) -> Any:
    """One level of the encoder. All but the first halve the sides."""
    name = f"{prefix}encode{level}"
    if config.architecture == "unet":
        strides = 1 if level == 0 else 2
        if level and config.downsampling == "pool":
            features, strides = keras.layers.MaxPool3D(name=f"{prefix}down{level}")(features), 1
        features = _conv(features, width, config, f"{name}a", strides)
        return _conv(features, width, config, f"{name}b")
    if level == 0:
        features = _conv(features, width, config, f"{prefix}stem")
    for block in range(config.residual_blocks[level]):
        strides = 2 if level and not block else 1
        features = _residual(features, width, config, f"{name}_{block}", strides)
    return features


def _residual(features: Any, width: int, config: ModelConfig, name: str, strides: int) -> Any:
    """conv-norm-act-conv-norm beside the identity (averaged and projected where sides or channels change,
    as in ResNet-D), then the activation."""
    inner = _conv(features, width, config, f"{name}a", strides)
    inner = _conv(inner, width, config, f"{name}b", activate=False)
    if strides > 1:
        features = keras.layers.AveragePooling3D(strides, name=f"{name}_pool")(features)
    if features.shape[-1] != width:
        features = _conv(features, width, config, f"{name}_project", size=1, activate=False)
    joined = keras.layers.Add(name=f"{name}_add")([inner, features])
    return keras.layers.LeakyReLU(0.01, name=f"{name}_act")(joined)


def _conv(
    features: Any,
    width: int,
    config: ModelConfig,
    name: str,
    strides: int = 1,
    *,
    size: int = 3,
    activate: bool = True,
) -> Any:
    """Convolution, norm and activation."""
    features = Conv3D(
        width,
        size,
        strides,
        padding="same",
        use_bias=config.norm == "none",
        kernel_initializer=_HE,
        name=f"{name}_conv",
    )(features)
    norm = _norm(config.norm, width, f"{name}_norm")
    features = norm(features) if norm else features
    return keras.layers.LeakyReLU(0.01, name=f"{name}_act")(features) if activate else features


def _norm(kind: str, width: int, name: str) -> keras.layers.Layer | None:
    if kind == "none":
        return None
    if kind == "instance":
        return InstanceNorm(name=name)
    if kind == "batch":
        return keras.layers.BatchNormalization(name=name)
    return keras.layers.GroupNormalization(groups=min(8, width), epsilon=1e-5, name=name)


def _head(features: Any, name: str) -> Any:
    # Nodule voxels are rare, so the network begins at p = 0.12 everywhere. At 0.01, where Lin et al. (2017)
    # begin, the loss falls sooner, but stays higher.
    rare = keras.initializers.Constant(-2.0)
    return keras.layers.Conv3D(
        1, 1, dtype="float32", kernel_initializer=Balanced(), bias_initializer=rare, name=name
    )(features)
