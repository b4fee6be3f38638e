"""How weights move: the learning-rate schedule and the optimisers."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from lungseg.config import OptimizerConfig, Recipe


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Warm-up from 0, then constant, half a cosine, or (1 - t)^power (Chen et al., 2017), to `total_steps`.

    `total_steps` is a variable, so that a run whose end is a time and not an epoch can move it.
    """

    def __init__(self, config: OptimizerConfig, global_batch: int, total_steps: int) -> None:
        self.config = config
        self.peak = config.learning_rate * global_batch / (config.reference_batch or global_batch)
        self.total_steps = keras.Variable(total_steps, trainable=False, dtype="float32", name="total_steps")

    def __call__(self, step: Any) -> tf.Tensor:
        total = tf.convert_to_tensor(self.total_steps)
        step = tf.cast(step, tf.float32)
        warmup = tf.minimum(float(self.config.warmup_steps), total / 2)
        rising = (step + 1) / tf.maximum(warmup, 1.0)
        done = tf.clip_by_value((step - warmup) / tf.maximum(total - warmup, 1.0), 0.0, 1.0)
        falling = {
            "constant": tf.ones_like(done),
            "cosine": 0.5 * (1 + tf.cos(math.pi * done)),
            "polynomial": tf.pow(1 - done, self.config.power),
        }[self.config.schedule]
        return self.peak * tf.where(step < warmup, rising, falling)


def rate_at(step: int, recipe: Recipe, steps_per_pass: int) -> float:
    """The learning rate of that step where the recipe's epochs end the schedule."""
    total = (recipe.train.steps_per_epoch or steps_per_pass) * recipe.train.epochs
    return float(Schedule(recipe.optimizer, recipe.train.global_batch, total)(step))


Common = dict[str, tf.Tensor]


class _OfSums(keras.optimizers.Optimizer):
    """Where both optimisers depart from Keras."""

    def _all_reduce_sum_gradients(self, pairs: list[Any]) -> list[Any]:
        """The gradients are summed over the replicas already: they had to be, to be clipped."""
        return pairs

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Left to `update_step`, which is given the rate: here Keras traces the schedule for each weight."""

    def _backend_update_step(
        self, gradients: list[Any], weights: list[Any], learning_rate: tf.Tensor
    ) -> None:
        """What all weights have in common is computed once, and comes to each in place of the rate."""
        super()._backend_update_step(gradients, weights, self._common(learning_rate))

    def _common(self, learning_rate: tf.Tensor) -> Common:
        return {"lr": learning_rate, "decay": learning_rate * self.weight_decay}

    def _decay(self, variable: tf.Variable, common: Common) -> None:
        if self._use_weight_decay(variable):
            variable.assign_sub(variable * common["decay"])


class _AdamW(_OfSums, keras.optimizers.AdamW):
    def _common(self, learning_rate: tf.Tensor) -> Common:
        step = tf.cast(self.iterations + 1, tf.float32)
        return {
            **super()._common(learning_rate),
            "beta1": tf.constant(self.beta_1),
            "beta2": tf.constant(self.beta_2),
            "beta1_power": tf.pow(self.beta_1, step),
            "beta2_power": tf.pow(self.beta_2, step),
            "epsilon": tf.constant(self.epsilon),
        }

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, common: Common) -> None:
        """TensorFlow's kernel for the formula that Keras writes down in 35 operations a weight."""
        self._decay(variable, common)
        number = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[number].value.handle,
            v=self._velocities[number].value.handle,
            grad=gradient,
            **{name: value for name, value in common.items() if name != "decay"},
        )


class _Sgd(_OfSums, keras.optimizers.SGD):
    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, common: Common) -> None:
        self._decay(variable, common)
        super().update_step(gradient, variable, common["lr"])


def make_optimizer(config: OptimizerConfig, schedule: Schedule, *, scale_loss: bool) -> Any:
    """AdamW or SGD with Nesterov momentum, decoupled weight decay (not on norms and biases); with a scaled
    loss for float16, where steps of infinite gradients are left out."""
    # Named, since checkpoints hold variables by path, and Keras numbers the names that it gives itself.
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "name": "optimizer"}
    if config.name == "adamw":
        optimizer = _AdamW(schedule, **common)
    else:
        optimizer = _Sgd(schedule, momentum=config.momentum, nesterov=True, **common)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale") if scale_loss else optimizer
