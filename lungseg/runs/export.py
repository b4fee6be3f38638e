"""Networks out of runs: the file that people pull, and the best model rebuilt for use here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from lungseg.config import ModelConfig, Recipe
from lungseg.model.precision import set_precision
from lungseg.model.unet import build_unet, with_probability
from lungseg.runs.checkpoint import Checkpoints, assign
from lungseg.runs.run import Published, load_published
from lungseg.storage import Store, keys
from lungseg.warm import uncollected


@dataclass(frozen=True, eq=False)  # each is itself: a recipe has no hash
class BestModel:
    """The best network of a run: `predict` takes float32 HU [n, z, y, x, 1], gives probabilities."""

    run: str
    checkpoint: str
    recipe: Recipe
    network: keras.Model

    def predict(self, volume_hu: np.ndarray) -> np.ndarray:
        probability: np.ndarray = self._graph(tf.convert_to_tensor(volume_hu, tf.float32)).numpy()
        return probability

    @tf.function(reduce_retracing=True, autograph=False)
    def _graph(self, volume_hu: tf.Tensor) -> tf.Tensor:
        with uncollected():
            return self.network(volume_hu, training=False)


def load_best(store: Store, run: str) -> BestModel:
    """Raises RunError("run-missing", "no-checkpoint" or "checkpoint-corrupt")."""
    return load_network(store, load_published(store, run))


def load_network(store: Store, published: Published) -> BestModel:
    """Rebuilt from its recipe and given verified weights; no foreign file is ever deserialised.

    Raises as `load_best`.
    """
    run, name, recipe = published.run, published.checkpoint, published.recipe
    weights = Checkpoints(store, keys.run_root(run)).read(name, with_optimizer=False).weights
    set_precision(recipe.train)
    model = build_unet(recipe.model)
    assign(model.weights, weights, name)
    return BestModel(run, name, recipe, with_probability(model, recipe.model))


def export_model(weights: Mapping[str, np.ndarray], config: ModelConfig) -> bytes:
    """model.keras of `float32_network`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        float32_network(weights, config).save(path)
        return path.read_bytes()


def float32_network(weights: Mapping[str, np.ndarray], config: ModelConfig) -> keras.Model:
    """A network of these weights that takes HU and gives probabilities.

    It is made on the CPU: beside it the training may use all of a GPU's memory.
    """
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("float32")
    try:
        with tf.device("CPU:0"):
            copy = build_unet(config)
            assign(copy.weights, weights, "model.keras")
            return with_probability(copy, config)
    finally:
        keras.mixed_precision.set_dtype_policy(policy)
