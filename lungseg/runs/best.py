"""The published network of a run, rebuilt from its recipe and verified weights."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from lungseg.config import Recipe, parse_recipe
from lungseg.model.precision import set_precision
from lungseg.model.unet import build_unet, with_probability
from lungseg.runs.checkpoint import Checkpoints, assign
from lungseg.runs.run import load_run, run_root
from lungseg.storage import Store


@dataclass(frozen=True)
class BestModel:
    """The best network of a run: `predict` takes float32 HU [n, z, y, x, 1], gives probabilities."""

    run: str
    data: str
    checkpoint: str
    recipe: Recipe
    network: keras.Model

    def predict(self, volume_hu: np.ndarray) -> np.ndarray:
        probability: np.ndarray = self._graph(tf.convert_to_tensor(volume_hu, tf.float32)).numpy()
        return probability

    @tf.function(reduce_retracing=True)
    def _graph(self, volume_hu: tf.Tensor) -> tf.Tensor:
        return self.network(volume_hu, training=False)


def load_best(store: Store, run: str) -> BestModel:
    """Rebuilt from its recipe and given verified weights; no foreign file is ever deserialised.

    Raises RunError("run-missing", "no-checkpoint" or "checkpoint-corrupt").
    """
    found = load_run(store, run)
    checkpoint = Checkpoints(store, run_root(run)).read_best()
    recipe = parse_recipe(checkpoint.state.recipe)
    set_precision(recipe.train)
    model = build_unet(recipe.model)
    assign(model.weights, checkpoint.weights, checkpoint.name)
    return BestModel(run, found.data, checkpoint.name, recipe, with_probability(model, recipe.model))
