"""One training step and one validation step over all replicas: our own, not `model.fit`.

Gradients are summed over replicas once, clipped by their global norm, and applied alike everywhere, so all
replicas hold equal weights and the result does not depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from lungseg.config import OptimizerConfig, Recipe
from lungseg.data.stream import Batch
from lungseg.model.augment import augment
from lungseg.model.losses import make_loss, target_and_weight
from lungseg.model.unet import build_unet


@dataclass(frozen=True)
class ValSums:
    """Counts over validation voxels that are not ignored."""

    hit: float = 0.0
    predicted: float = 0.0
    reference: float = 0.0

    def __add__(self, other: ValSums) -> ValSums:
        return ValSums(
            self.hit + other.hit, self.predicted + other.predicted, self.reference + other.reference
        )

    @property
    def dice(self) -> float:
        """Dice of all validation patches taken as one volume; 1.0 where nothing is there nor predicted."""
        total = self.predicted + self.reference
        return 2 * self.hit / total if total else 1.0


class Stepper:
    """Model and optimiser under a strategy. `step` counts optimiser updates from 0."""

    def __init__(self, recipe: Recipe, strategy: tf.distribute.Strategy, total_steps: int) -> None:
        self.strategy = strategy
        self._recipe = recipe
        self._loss = make_loss(recipe.loss)
        keras.utils.set_random_seed(recipe.train.seed)
        with strategy.scope():
            self.model = build_unet(recipe.model)
            self.optimizer = make_optimizer(recipe.optimizer, total_steps)
            self.optimizer.build(self.model.trainable_variables)
        # The gradients that `_train` hands over are summed already: they had to be, to be clipped.
        self.optimizer._all_reduce_sum_gradients = lambda pairs: pairs

    def train(self, batch: Batch) -> tf.Tensor:
        """Update the weights once; the mean loss of the global batch, still on the device."""
        return self._train(*self._distribute(batch), tf.constant(batch.step, tf.int64))

    def validate(self, batch: Batch) -> ValSums:
        image, mask, _ = self._distribute(batch)
        return ValSums(*(float(total) for total in self._validate(image, mask)))

    def _distribute(self, batch: Batch) -> tuple[Any, Any, Any]:
        """This worker's rows, dealt out to its replicas in their order."""
        local = self.strategy.num_replicas_in_sync // _workers(self.strategy)
        rows = np.arange(batch.first_row, batch.first_row + len(batch.mask), dtype=np.int64)
        arrays = batch.image_hu, batch.mask, rows
        if local == 1:
            return tuple(tf.convert_to_tensor(array) for array in arrays)
        share = len(rows) // local

        def part(array: np.ndarray) -> Any:
            def of(context: Any) -> tf.Tensor:
                first = context.replica_id_in_sync_group % local * share
                return tf.convert_to_tensor(array[first : first + share])

            return self.strategy.experimental_distribute_values_from_function(of)

        return tuple(part(array) for array in arrays)

    @tf.function
    def _train(self, image: Any, mask: Any, rows: Any, step: tf.Tensor) -> tf.Tensor:
        recipe = self._recipe
        variables = self.model.trainable_variables

        def replica(image: tf.Tensor, mask: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
            hu, target = tf.cast(image, tf.float32)[..., tf.newaxis], mask[..., tf.newaxis]
            hu, target = augment(hu, target, recipe.augment, recipe.train.seed, step, rows)
            with tf.GradientTape() as tape:
                losses = self._loss(self.model(hu, training=True), target)
                loss = tf.reduce_sum(losses) / recipe.train.global_batch
            gradients = tape.gradient(loss, [v.value for v in variables])
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            gradients, _ = tf.clip_by_global_norm(gradients, recipe.optimizer.clip_norm)
            self.optimizer.apply(gradients, variables)
            return loss

        loss = self.strategy.run(replica, (image, mask, rows))
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, loss, axis=None)

    @tf.function
    def _validate(self, image: Any, mask: Any) -> list[tf.Tensor]:
        def replica(image: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
            logits = self.model(tf.cast(image, tf.float32)[..., tf.newaxis], training=False)
            target, weight = target_and_weight(mask[..., tf.newaxis])
            predicted = tf.cast(logits > 0, tf.float32) * weight
            return tf.reduce_sum(predicted * target), tf.reduce_sum(predicted), tf.reduce_sum(target)

        sums = self.strategy.run(replica, (image, mask))
        return [self.strategy.reduce(tf.distribute.ReduceOp.SUM, one, axis=None) for one in sums]


def make_optimizer(config: OptimizerConfig, total_steps: int) -> keras.optimizers.Optimizer:
    """AdamW or SGD with Nesterov momentum, decoupled weight decay (not on norms and biases)."""
    rate = config.learning_rate
    if config.schedule == "cosine":
        warmup = min(config.warmup_steps, total_steps // 2)
        rate = keras.optimizers.schedules.CosineDecay(
            rate / 100 if warmup else rate,
            max(1, total_steps - warmup),
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    # Named, since checkpoints hold variables by path, and Keras numbers the names that it gives itself.
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "name": "optimizer"}
    if config.name == "adamw":
        optimizer = keras.optimizers.AdamW(rate, **common)
    else:
        optimizer = keras.optimizers.SGD(rate, momentum=config.momentum, nesterov=True, **common)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


def _workers(strategy: tf.distribute.Strategy) -> int:
    resolver = strategy.cluster_resolver
    spec = resolver.cluster_spec().as_dict() if resolver else {}
    return max(1, len(spec.get("worker", ())))
