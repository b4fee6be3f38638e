"""Segmentation losses on logits, with voxels to ignore.

Logits are float32 [n, z, y, x, 1]; masks hold 1 (nodule), 0 and 255 (ignore: no loss, no gradient).
`reduction` says over what the overlap losses count: "sample" makes one Dice a patch, "batch" one over all
patches of a replica, which is steadier when many patches hold no nodule (Isensee et al., 2021). The result
is float32 [n] (for "batch" n equal values), so that its sum over all replicas divided by the global batch
is the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from lungseg.config import LossConfig

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
_SMOOTH = 1.0
"""Added to both sides of an overlap ratio, in voxels: keeps gradients finite on empty masks."""


def make_loss(config: LossConfig) -> Loss:
    """The loss of a recipe, (logits, mask) -> float32 [n]."""
    parts: dict[str, Loss] = {
        "dice": lambda logits, mask: _tversky(logits, mask, 0.5, config.reduction),
        "tversky": lambda logits, mask: _tversky(logits, mask, config.tversky_alpha, config.reduction),
        "bce": lambda logits, mask: _cross_entropy(logits, mask, 0.0),
        "focal": lambda logits, mask: _cross_entropy(logits, mask, config.focal_gamma),
    }
    if config.name == "focal_tversky":
        # Abraham & Khan (2019) raise to 1/gamma with gamma = 4/3.
        return lambda logits, mask: tf.pow(tf.maximum(parts["tversky"](logits, mask), 1e-6), 0.75)
    chosen = [parts[name] for name in config.name.split("_")]
    return lambda logits, mask: tf.add_n([part(logits, mask) for part in chosen])


def supervise(loss: Loss, outputs: Sequence[tf.Tensor], mask: tf.Tensor) -> tf.Tensor:
    """The loss of a network with deep supervision, float32 [n]: `outputs` are logits at full size, at 1/2,
    1/4, …; each counts half as much as the one before, and the weights sum to 1 (Isensee et al., 2021)."""
    total = sum(0.5**level for level in range(len(outputs)))
    losses = [
        loss(logits, coarse_mask(mask, 2**level)) * (0.5**level / total)
        for level, logits in enumerate(outputs)
    ]
    return tf.add_n(losses)


def coarse_mask(mask: tf.Tensor, factor: int) -> tf.Tensor:
    """uint8 [n, z, y, x, 1] with sides divided: nodule where any voxel of the block is, else ignored where
    any is. A nearest voxel would lose the small nodules."""
    if factor == 1:
        return mask
    rank = tf.where(mask == 1, 2.0, tf.where(mask == 255, 1.0, 0.0))
    rank = tf.nn.max_pool3d(rank, factor, factor, "VALID")
    values = tf.where(rank == 2, 1, tf.where(rank == 1, 255, 0))
    return tf.cast(values, tf.uint8)


def target_and_weight(mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """float32 target (1 nodule) and weight (0 where ignored) of a mask."""
    return tf.cast(mask == 1, tf.float32), tf.cast(mask != 255, tf.float32)


def _tversky(logits: tf.Tensor, mask: tf.Tensor, alpha: float, reduction: str) -> tf.Tensor:
    """1 - TP / (TP + alpha FP + (1 - alpha) FN) on probabilities (Salehi et al., 2017); alpha 0.5 is soft
    Dice (Milletari et al., 2016)."""
    target, weight = target_and_weight(mask)
    axes = [1, 2, 3, 4] if reduction == "sample" else [0, 1, 2, 3, 4]
    probability = tf.sigmoid(logits) * weight
    hit = tf.reduce_sum(probability * target, axes)
    predicted, reference = tf.reduce_sum(probability, axes), tf.reduce_sum(target * weight, axes)
    # Twice the textbook's numerator and denominator, so that _SMOOTH counts as in soft Dice.
    ratio = (2 * hit + _SMOOTH) / (
        2 * (hit + alpha * (predicted - hit) + (1 - alpha) * (reference - hit)) + _SMOOTH
    )
    return (1 - ratio) * tf.ones([tf.shape(logits)[0]])


def _cross_entropy(logits: tf.Tensor, mask: tf.Tensor, gamma: float) -> tf.Tensor:
    """Mean binary cross-entropy of each sample, times (1 - p of the true class)^gamma (Lin et al., 2017)."""
    target, weight = target_and_weight(mask)
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(target, logits)
    if gamma:
        # By logarithms: a power below 1 has no gradient at 0, where the network is sure and right.
        wrong = tf.nn.sigmoid_cross_entropy_with_logits(1 - target, logits)
        entropy *= tf.exp(-gamma * wrong)
    axes = [1, 2, 3, 4]
    return tf.math.divide_no_nan(tf.reduce_sum(entropy * weight, axes), tf.reduce_sum(weight, axes))
