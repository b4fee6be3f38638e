"""How long a trial's network takes for a scan: the second objective of a sweep, beside Dice."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np

from lungseg.cluster import connect
from lungseg.config import Recipe
from lungseg.scan.tiling import tiles
from lungseg.storage import Store, keys

LUNGS_MM = (300.0, 260.0, 340.0)
"""z, y, x of the box that is tiled in a scan of an adult."""
_ROUNDS = 5


def measure_pace(store: Store, root: str, recipe: Recipe, resources: dict[str, int]) -> None:
    """Keep the seconds a scan of the trial below `root`, as one of its workers takes them, unless they are
    known. They are the same whatever its weights are."""
    if store.exists(keys.scan_seconds(root)):
        return
    ray = connect()
    task = ray.remote(
        max_calls=1,  # its process goes, and TensorFlow's memory with it
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy="DEFAULT",  # not in the trial's own group, which holds no cores
    )(scan_seconds)
    store.put_json(keys.scan_seconds(root), ray.get(task.remote(recipe, resources["CPU"])))


def scan_seconds(recipe: Recipe, cores: int) -> float:
    """Of an untrained network: the median window's time, for all windows of a box of LUNGS_MM."""
    from lungseg.telemetry import quiet_tensorflow

    with quiet_tensorflow():
        import tensorflow as tf

        from lungseg.model.precision import set_precision
        from lungseg.model.unet import build_unet, with_probability
        from lungseg.runs.export import BestModel

    tf.config.threading.set_intra_op_parallelism_threads(cores)
    set_precision(recipe.train)
    network = BestModel("", "", recipe, with_probability(build_unet(recipe.model), recipe.model))
    segment = recipe.segment
    box = [round(mm / spacing) for mm, spacing in zip(LUNGS_MM, recipe.data.spacing_mm, strict=True)]
    window, corners = tiles(
        box, segment.window_zyx, recipe.data.patch.shape_zyx, recipe.model.total_stride, segment.overlap
    )
    batch = np.zeros((segment.batch, *window, 1), np.float32)
    times = []
    for _ in range(1 + _ROUNDS):  # the first one is traced
        began = time.perf_counter()
        network.predict(batch)
        times.append(time.perf_counter() - began)
    images = 8 if segment.mirror else 1
    return statistics.median(times[1:]) * math.ceil(len(corners) / segment.batch) * images
