"""Networks out of runs: the file that people pull, and the best model rebuilt for use here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from lungseg.config import ModelConfig
from lungseg.model.unet import build_unet, with_probability
from lungseg.runs.checkpoint import assign


def export_model(weights: Mapping[str, np.ndarray], config: ModelConfig) -> bytes:
    """model.keras of a float32 network of these weights that takes HU and gives probabilities.

    It is made on the CPU: beside it the training may use all of a GPU's memory.
    """
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_dtype_policy("float32")
    try:
        with tf.device("CPU:0"):
            copy = build_unet(config)
            assign(copy.weights, weights, "model.keras")
    finally:
        keras.mixed_precision.set_dtype_policy(policy)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        with_probability(copy, config).save(path)
        return path.read_bytes()
