"""One training step and one validation step over all replicas: our own, not `model.fit`.

Gradients are summed over replicas once, clipped by their global norm, and applied alike everywhere, so all
replicas hold equal weights and the result does not depend on how many there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from lungseg.config import Recipe
from lungseg.model.augment import augment
from lungseg.model.losses import Loss, over_levels, target_and_weight
from lungseg.model.unet import build_unet, by_member, with_probability
from lungseg.runs.checkpoint import arrays, assign
from lungseg.stream.patch_stream import Batch
from lungseg.train.optimizer import Schedule, make_optimizer
from lungseg.warm import uncollected

Tensors = list[tf.Tensor]
_traced = partial(tf.function, autograph=False)
"""Autograph would read and rewrite all code on the way for conditions and loops over tensors. There are none,
but it takes half of the CPU time that a first step does."""


@dataclass(frozen=True)
class ValSums:
    """What validation adds up. Voxels are counted where they are not ignored."""

    hit: float = 0.0  # voxels that are nodule, and predicted so
    predicted: float = 0.0
    reference: float = 0.0
    dices: float = 0.0  # of each patch that holds a nodule, added up
    patches: float = 0.0  # the number of patches that hold one

    def __add__(self, other: ValSums) -> ValSums:
        return ValSums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def dice(self, mode: Literal["pooled", "patches"]) -> float:
        """The validation Dice.

        "pooled" takes all patches as one volume: large nodules weigh more, and false positives count in every
        patch. "patches" is the mean over the patches that hold a nodule: each weighs the same.
        Without any nodule voxel it is 1.0, unless pooled voxels are predicted.
        """
        if mode == "patches":
            return self.dices / self.patches if self.patches else 1.0
        total = self.predicted + self.reference
        return 2 * self.hit / total if total else 1.0


class OnDevices(NamedTuple):
    """A batch on the devices: what every replica gets of image, mask and rows."""

    image: Any
    mask: Any
    rows: Any
    step: tf.Tensor


class Measured(NamedTuple):
    """Of one step, still on the device: reading it waits for the step."""

    loss: tf.Tensor
    gradient_norm: tf.Tensor


class _Graphs(NamedTuple):
    """What a replica computes by itself. Traced once: a replica would trace each anew for its device."""

    augmented: Callable[..., Any]
    loss_and_gradient: Callable[..., Any]
    clipped: Callable[..., Any]


class Stepper:
    """Networks and optimiser under a strategy. `step` counts optimiser updates from 0.

    `model` is the network that is validated and published: the moving average of the weights where the
    recipe asks for one, else the network in training itself.
    """

    def __init__(self, recipe: Recipe, strategy: tf.distribute.Strategy, total_steps: int) -> None:
        self.strategy = strategy
        self.graph_seconds = 0.0  # the first step's, which traces the graph
        self._recipe = recipe
        self._loss = Loss(recipe.loss)
        keras.utils.set_random_seed(recipe.train.seed)
        self._scaled = keras.mixed_precision.dtype_policy().compute_dtype == "float16"
        with uncollected(), strategy.scope():
            self._trained = self.model = build_unet(recipe.model)
            if recipe.optimizer.ema:
                self.model = build_unet(recipe.model)
                self.model.set_weights(self._trained.get_weights())
            self._probability = with_probability(self.model, recipe.model)
            self.schedule = Schedule(recipe.optimizer, recipe.train.global_batch, total_steps)
            self.optimizer = make_optimizer(recipe.optimizer, self.schedule, scale_loss=self._scaled)
            self.optimizer.build(self._trained.trainable_variables)
        config, shared = recipe.train, self._loss.of_batch and strategy.num_replicas_in_sync > 1
        xla = config.xla == "always" or (config.xla == "auto" and config.gpus_per_worker > 0)
        # Replicas that share a loss meet between measuring and the gradient, and XLA compiles no meeting.
        self._total = over_replicas if shared else None
        compiled = self._measure if shared else partial(self._loss_and_gradient, self._measure)
        self._compiled = _traced(compiled, jit_compile=xla)

    def distribute(self, batch: Batch) -> OnDevices:
        """This worker's rows, dealt out to its replicas in their order."""
        local = self.strategy.num_replicas_in_sync // _workers(self.strategy)
        rows = np.arange(batch.first_row, batch.first_row + len(batch.mask), dtype=np.int64)
        share, left = divmod(len(rows), local)
        if left:
            raise ValueError(f"{len(rows)} rows cannot be dealt out to {local} replicas")

        def part(array: np.ndarray) -> Any:
            def of(context: Any) -> tf.Tensor:
                first = context.replica_id_in_sync_group % local * share
                return tf.convert_to_tensor(array[first : first + share])

            return self.strategy.experimental_distribute_values_from_function(of)

        step = tf.constant(batch.step, tf.int64)
        return OnDevices(part(batch.image_hu), part(batch.mask), part(rows), step)

    def train(self, on_devices: OnDevices) -> Measured:
        """Update the weights once."""
        if self.graph_seconds:
            return Measured(*self._train(*on_devices))
        began = time.monotonic()
        with uncollected():
            measured = Measured(*self._train(*on_devices))
        self.graph_seconds = time.monotonic() - began
        return measured

    def validate(self, on_devices: OnDevices) -> ValSums:
        return ValSums(*(float(total) for total in self._validate(on_devices.image, on_devices.mask)))

    def learning_rate(self, step: int) -> float:
        return float(self.schedule(step))

    def plan(self, total_steps: int) -> None:
        """Let the learning-rate schedule end there."""
        self.schedule.total_steps.assign(total_steps)

    def weights(self) -> dict[str, np.ndarray]:
        """What is validated and published, copied to the host, by path."""
        return arrays(self.model.weights)

    def training_state(self) -> dict[str, np.ndarray]:
        """What training needs besides to go on: the optimiser, the generators that dropout draws from, and
        the weights behind their average."""
        return arrays(self._behind())

    def restore(
        self, weights: Mapping[str, np.ndarray], training_state: Mapping[str, np.ndarray], checkpoint: str
    ) -> None:
        """Raises RunError("checkpoint-mismatch")."""
        assign(self.model.weights, weights, checkpoint)
        assign(self._behind(), training_state, checkpoint)

    def begin_with(self, weights: Mapping[str, np.ndarray], checkpoint: str) -> None:
        """Train on from other weights with a fresh optimiser. Raises RunError("checkpoint-mismatch")."""
        assign(self.model.weights, weights, checkpoint)
        self._trained.set_weights(self.model.get_weights())

    def _behind(self) -> list[Any]:
        """Every variable but the published weights, under names that no process numbers anew."""
        weights = {id(variable) for variable in self._trained.weights}
        generators = [variable for variable in self._trained.variables if id(variable) not in weights]
        named = [(f"random/{number}", variable) for number, variable in enumerate(generators)]
        if self.model is not self._trained:
            named += [(f"trained/{variable.path}", variable) for variable in self._trained.weights]
        renamed = [
            SimpleNamespace(path=path, shape=one.shape, numpy=one.numpy, assign=one.assign)
            for path, one in named
        ]
        return [*self.optimizer.variables, *renamed]

    @_traced
    def _train(self, image: Any, mask: Any, rows: Any, step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        first = [self.strategy.experimental_local_results(one)[0] for one in (image, mask, rows)]
        replica = partial(self._replica, self._graphs(*first, step))
        measured = self.strategy.run(replica, (image, mask, rows, step))
        if self.model is not self._trained:
            self._average(step)
        total = tf.distribute.ReduceOp.SUM
        # The norm is of the summed gradients, and the same everywhere.
        norm = self.strategy.experimental_local_results(measured[1])[0]
        return self.strategy.reduce(total, measured[0], axis=None), norm

    def _graphs(self, *of_one_replica: tf.Tensor) -> _Graphs:
        augmented = self._augmented.get_concrete_function(*of_one_replica)
        weights, state = map(_specs, _variables(self._trained))
        scale = tf.TensorSpec([], tf.float32)
        arguments = [*augmented.structured_outputs, weights, state]
        if self._total:
            measure = self._compiled.get_concrete_function(*arguments)
            loss = partial(self._loss_and_gradient, measure)
        else:
            loss = self._compiled.get_concrete_function(*arguments, scale)
        gradient = tf.TensorSpec([sum(one.shape.num_elements() for one in weights)], tf.float32)
        return _Graphs(augmented, loss, self._clipped.get_concrete_function(gradient, scale))

    def _replica(
        self, graphs: _Graphs, image: tf.Tensor, mask: tf.Tensor, rows: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        hu, target = graphs.augmented(image, mask, rows, step)
        scale = self.optimizer.scale_loss(tf.constant(1.0)) if self._scaled else tf.constant(1.0)
        weights, state = map(_values, _variables(self._trained))
        loss, gradient, state = graphs.loss_and_gradient(hu, target, weights, state, scale)
        for variable, value in zip(self._trained.non_trainable_variables, state, strict=True):
            variable.assign(value)
        context = tf.distribute.get_replica_context()
        gradients, norm = graphs.clipped(context.all_reduce(tf.distribute.ReduceOp.SUM, gradient), scale)
        self.optimizer.apply(gradients, self._trained.trainable_variables)
        return loss, norm / scale

    @_traced
    def _augmented(
        self, image: tf.Tensor, mask: tf.Tensor, rows: tf.Tensor, step: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        recipe = self._recipe
        hu, target = tf.cast(image, tf.float32)[..., tf.newaxis], mask[..., tf.newaxis]
        return augment(hu, target, recipe.augment, recipe.model.hu_window, recipe.train.seed, step, rows)

    def _loss_and_gradient(
        self,
        measure: Callable[..., Any],
        hu: tf.Tensor,
        mask: tf.Tensor,
        weights: Tensors,
        state: Tensors,
        scale: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, Tensors]:
        """This replica's part of the mean over the global batch and an ensemble's members; the gradient of
        all weights in a row, times `scale`, of each member's loss as if it were alone; what the network's
        other variables become."""
        with tf.GradientTape() as tape:
            tape.watch(weights)
            measured, state = measure(hu, mask, weights, state)
            losses = over_levels(self._loss.value(measured, self._total or tf.identity))
            loss = tf.reduce_sum(losses) / self._recipe.train.global_batch
            scaled = loss * scale
        gradient = tf.concat([tf.reshape(one, [-1]) for one in tape.gradient(scaled, weights)], 0)
        return loss / self._recipe.model.members, gradient, state

    @_traced
    def _clipped(self, gradient: tf.Tensor, scale: tf.Tensor) -> tuple[Tensors, tf.Tensor]:
        """The summed gradient clipped, for each weight its own, and its norm."""
        [clipped], norm = tf.clip_by_global_norm([gradient], self._recipe.optimizer.clip_norm * scale)
        shapes = [weight.shape for weight in self._trained.trainable_variables]
        parts = tf.split(clipped, [math.prod(shape) for shape in shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)], norm

    def _measure(
        self, hu: tf.Tensor, mask: tf.Tensor, weights: Tensors, state: Tensors
    ) -> tuple[tf.Tensor, Tensors]:
        """float32 [members, levels, n, 4]: see Loss.measure."""
        outputs, state = self._trained.stateless_call(weights, state, hu, training=True)
        members = by_member(outputs, self._recipe.model)
        return tf.stack([self._loss.supervise(outputs, mask) for outputs in members]), state

    def _average(self, step: tf.Tensor) -> None:
        """Move the average towards the weights; faster at first, when they are far from any good."""
        done = tf.cast(step, tf.float32)
        share = 1 - tf.minimum(self._recipe.optimizer.ema, (1 + done) / (10 + done))
        for average, now in zip(self.model.weights, self._trained.weights, strict=True):
            self.strategy.extended.update(
                average.value, lambda a, w: a.assign_add(share * (w - a)), args=(now.value,), group=False
            )

    @_traced
    def _validate(self, image: Any, mask: Any) -> Tensors:
        first = [self.strategy.experimental_local_results(one)[0] for one in (image, mask)]
        variables = _variables(self._probability)
        added = self._added.get_concrete_function(*first, *map(_specs, variables))
        sums = self.strategy.run(lambda *batch: added(*batch, *map(_values, variables)), (image, mask))
        return [self.strategy.reduce(tf.distribute.ReduceOp.SUM, one, axis=None) for one in sums]

    @_traced
    def _added(self, image: tf.Tensor, mask: tf.Tensor, weights: Tensors, state: Tensors) -> Tensors:
        """The fields of `ValSums` for the patches at hand."""
        hu = tf.cast(image, tf.float32)[..., tf.newaxis]
        with uncollected():
            probability, _ = self._probability.stateless_call(weights, state, hu, training=False)
        target, weight = target_and_weight(mask[..., tf.newaxis])
        predicted = tf.cast(probability > 0.5, tf.float32) * weight
        hit, found, wanted = (
            tf.reduce_sum(one, [1, 2, 3, 4]) for one in (predicted * target, predicted, target)
        )
        holds = tf.cast(wanted > 0, tf.float32)
        dices = holds * tf.math.divide_no_nan(2 * hit, found + wanted)
        return [tf.reduce_sum(one) for one in (hit, found, wanted, dices, holds)]


@tf.custom_gradient
def over_replicas(mine: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
    """The sum over all replicas. Each replica's loss is the same function of it, and the gradients of all are
    added up: so that of one is this replica's own, times their number, and needs no second meeting."""
    context = tf.distribute.get_replica_context()
    everywhere = context.all_reduce(tf.distribute.ReduceOp.SUM, mine)
    return everywhere, lambda upstream: upstream * context.num_replicas_in_sync


def _variables(model: keras.Model) -> tuple[list[Any], list[Any]]:
    return model.trainable_variables, model.non_trainable_variables


def _values(variables: list[Any]) -> Tensors:
    """This replica's."""
    return [tf.convert_to_tensor(variable.value) for variable in variables]


def _specs(variables: list[Any]) -> list[tf.TensorSpec]:
    return [tf.TensorSpec(variable.shape, variable.dtype) for variable in variables]


def _workers(strategy: tf.distribute.Strategy) -> int:
    resolver = strategy.cluster_resolver
    spec = resolver.cluster_spec().as_dict() if resolver else {}
    return max(1, len(spec.get("worker", ())))
