"""Segmentation losses on logits, with voxels to ignore.

Logits are float32 [n, z, y, x, 1]; masks hold 1 (nodule), 0 and 255 (ignore: no loss, no gradient).
`reduction` says over what the overlap losses count: "sample" makes one Dice a patch, "batch" one over all
patches of the global batch, which is steadier when many patches hold no nodule (Isensee et al., 2021).

A loss has two halves. `measure` reads voxels and gives a few numbers a patch; `value` makes the loss of them.
Between the two, whoever trains on several devices adds up what the global batch has in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from lungseg.config import LossConfig

Total = Callable[[tf.Tensor], tf.Tensor]
"""From the sums over the patches at hand to those over the global batch."""
_SMOOTH = 1.0
"""Added to both sides of an overlap ratio, in voxels: keeps gradients finite on empty masks."""


class Loss:
    """The loss of a recipe."""

    def __init__(self, config: LossConfig) -> None:
        self._config = config
        self._parts = ["tversky"] if config.name == "focal_tversky" else config.name.split("_")
        self._overlaps = not {"dice", "tversky"}.isdisjoint(self._parts)
        self._crosses = not {"bce", "focal"}.isdisjoint(self._parts)
        self.of_batch = self._overlaps and config.reduction == "batch"
        """Whether the patches of a global batch have a loss in common."""

    def __call__(self, logits: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """float32 [n], where all patches are at hand."""
        return self.value(self.measure(logits, mask))

    def measure(self, logits: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """float32 [n, 4]: of each patch true positives, predicted and reference (voxels, by probability)
        and the mean cross-entropy; 0 for what this loss does not need."""
        nothing = tf.zeros(tf.shape(logits)[:1])
        gamma = self._config.focal_gamma if "focal" in self._parts else 0.0
        overlap = _overlap(logits, mask) if self._overlaps else [nothing] * 3
        return tf.stack([*overlap, _cross_entropy(logits, mask, gamma) if self._crosses else nothing], -1)

    def supervise(self, outputs: Sequence[tf.Tensor], mask: tf.Tensor) -> tf.Tensor:
        """float32 [levels, n, 4]: measures of a network with deep supervision, whose `outputs` are logits at
        full size, at 1/2, 1/4, …"""
        levels = enumerate(outputs)
        return tf.stack([self.measure(logits, coarse_mask(mask, 2**level)) for level, logits in levels])

    def value(self, measured: tf.Tensor, total: Total = tf.identity) -> tf.Tensor:
        """float32 [..., n] of measures [..., n, 4]; of a whole batch n equal values, so that the sum over all
        devices divided by the global batch is the mean."""
        overlap, cross_entropy = measured[..., :3], measured[..., 3]
        if self.of_batch:
            overlap = total(tf.reduce_sum(overlap, -2))[..., tf.newaxis, :]
        parts = {
            "dice": lambda: _tversky(overlap, 0.5),
            "tversky": lambda: _tversky(overlap, self._config.tversky_alpha),
            "bce": lambda: cross_entropy,
            "focal": lambda: cross_entropy,
        }
        loss = tf.add_n([parts[part]() * tf.ones_like(cross_entropy) for part in self._parts])
        # Abraham & Khan (2019) raise to 1/gamma with gamma = 4/3.
        return tf.pow(tf.maximum(loss, 1e-6), 0.75) if self._config.name == "focal_tversky" else loss


def over_levels(losses: tf.Tensor) -> tf.Tensor:
    """The loss [..., n] of deep supervision's [..., levels, n]: each level counts half as much as the one
    before, and the weights sum to 1 (Isensee et al., 2021)."""
    weights = 0.5 ** tf.range(losses.shape[-2], dtype=losses.dtype)
    return tf.tensordot(losses, weights / tf.reduce_sum(weights), [[-2], [0]])


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


def _overlap(logits: tf.Tensor, mask: tf.Tensor) -> list[tf.Tensor]:
    """True positives, predicted and reference of each patch."""
    target, weight = target_and_weight(mask)
    probability = tf.sigmoid(logits) * weight
    return [tf.reduce_sum(one, [1, 2, 3, 4]) for one in (probability * target, probability, target)]


def _tversky(overlap: tf.Tensor, alpha: float) -> tf.Tensor:
    """1 - TP / (TP + alpha FP + (1 - alpha) FN) on probabilities (Salehi et al., 2017); alpha 0.5 is soft
    Dice (Milletari et al., 2016)."""
    hit, predicted, reference = tf.unstack(overlap, axis=-1)
    # Twice the textbook's numerator and denominator, so that _SMOOTH counts as in soft Dice.
    false_or_missed = alpha * (predicted - hit) + (1 - alpha) * (reference - hit)
    return 1 - (2 * hit + _SMOOTH) / (2 * (hit + false_or_missed) + _SMOOTH)


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
