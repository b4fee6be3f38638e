"""One device, two and four train the same network, whatever the loss counts over.

Each number of devices has a process of its own: TensorFlow divides a CPU once, and strategies of different
sizes must not meet in one process.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from helpers.servers import free_ports

from lungseg.config import LossName

LOSSES = [(name, reduction) for name in get_args(LossName) for reduction in ("sample", "batch")]
STEPS: dict[str, tuple[str, ...]] = {
    "levels and members": ("model.deep_supervision=1", "model.members=2", "model.depth=3"),
    "compiled": ("train.xla=always",),
}
SETTINGS = (
    "model.width=2", "model.depth=2", "train.global_batch=4", "augment.warp_share=0", "optimizer.name=sgd",
    "optimizer.learning_rate=0.1", "optimizer.warmup_steps=0", "optimizer.schedule=constant",
)  # fmt: skip

HEAD = """
import os, sys
import numpy as np, tensorflow as tf
from lungseg.config import LossConfig, load_recipe
from lungseg.model.losses import Loss
from lungseg.stream.patch_stream import Batch
from lungseg.train.step import Stepper, over_replicas
from lungseg.train.strategy import make_strategy
from test_replicas import LOSSES, SETTINGS, STEPS
devices, out = int(sys.argv[1]), sys.argv[2]
divided = f"train.logical_cpu_devices={devices}"
workers = 2 if "TF_CONFIG" in os.environ else 1
strategy = make_strategy(load_recipe(None, [*SETTINGS, divided, f"train.workers={workers}"]), workers, None)
random, found = np.random.default_rng(0), {}
mask = random.choice([0, 1, 255], (4, 8, 8, 8), p=[0.6, 0.3, 0.1]).astype(np.uint8)
mask[1], mask[2, :6] = 0, 255  # so that no two replicas see alike
"""
LOSS = """
logits = random.normal(0, 2, (*mask.shape, 1)).astype(np.float32)
losses = [Loss(LossConfig(name=name, reduction=reduction)) for name, reduction in LOSSES]

def each_loss(mine, labels, total):
    for loss in losses:
        with tf.GradientTape() as tape:
            tape.watch(mine)
            value = tf.reduce_sum(loss.value(loss.measure(mine, labels), total)) / 4
        yield value, tape.gradient(value, mine)

def replica():
    share = 4 // strategy.num_replicas_in_sync
    first = tf.distribute.get_replica_context().replica_id_in_sync_group * share
    mine, labels = (tf.constant(a)[first : first + share] for a in (logits, mask[..., None]))
    return list(each_loss(mine, labels, over_replicas))

expected = each_loss(tf.constant(logits), tf.constant(mask[..., None]), tf.identity)
parts = tf.function(lambda: strategy.run(replica))()
for name, alone, (values, gradients) in zip(LOSSES, expected, parts, strict=True):
    values, gradients = map(strategy.experimental_local_results, (values, gradients))
    found["/".join((*name, "loss"))] = alone[0], sum(map(float, values))
    gradient = np.concatenate([part.numpy() for part in gradients])
    found["/".join((*name, "gradient"))] = alone[1], gradient
np.savez(out, **{f"{name}/{one}": both[one] for name, both in found.items() for one in (0, 1)})
"""
STEP = """
image = (np.where(mask == 1, 0, -800) + random.normal(0, 50, mask.shape)).astype(np.int16)
for name, settings in STEPS.items():
    stepper = Stepper(load_recipe(None, [*SETTINGS, divided, *settings]), strategy, 10)
    measured = stepper.train(stepper.distribute(Batch(0, 0, image, mask)))
    found[f"{name}/loss"], found[f"{name}/norm"] = float(measured.loss), float(measured.gradient_norm)
    found |= {f"{name}/weights/{path}": array for path, array in stepper.weights().items()}
    (traced,) = stepper._train._list_all_concrete_functions()
    functions = traced.graph.as_graph_def().library.function
    found[f"{name}/nodes"] = sum(len(one.node_def) for one in functions)
np.savez(out, **found)
"""


def run(script: str, devices: int, folder: Path, environment: Mapping[str, str] | None = None) -> Any:
    """A process with so many devices of each worker; the file that it writes its arrays to."""
    out = folder / f"{devices}{secrets.token_hex(4)}.npz"
    command = [sys.executable, "-c", HEAD + script, str(devices), str(out)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **(environment or {})}
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_no_loss_nor_its_gradient_depends_on_the_number_of_replicas(devices: int, tmp_path: Path) -> None:
    """Of every name and reduction, by the gradient at each voxel."""
    found = run(LOSS, devices, tmp_path)
    assert len(found) == 4 * len(LOSSES) == 56
    for name in (name.removesuffix("/0") for name in found if name.endswith("/0")):
        alone, together = found[f"{name}/0"], found[f"{name}/1"]
        assert np.abs(alone).max() > 1e-4
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_nor_on_that_of_workers(tmp_path: Path) -> None:
    """Two processes that meet over the network; each tells its own part."""
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    tasks = [{"cluster": cluster, "task": {"type": "worker", "index": index}} for index in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        parts = [pool.submit(run, LOSS, 1, tmp_path, {"TF_CONFIG": json.dumps(task)}) for task in tasks]
        first, second = (part.result() for part in parts)
    for name in (name.removesuffix("/0") for name in first if name.endswith("/0")):
        alone, mine, other = first[f"{name}/0"], first[f"{name}/1"], second[f"{name}/1"]
        together = mine + other if name.endswith("loss") else np.concatenate([mine, other])
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_neither_does_a_step_of_an_ensemble_under_deep_supervision_nor_a_compiled_one(tmp_path: Path) -> None:
    """By the weights after a step of plain descent, which tell every gradient. Nor is the network traced anew
    for each."""
    one, two = (run(STEP, devices, tmp_path) for devices in (1, 2))
    for name in STEPS:
        assert two.pop(f"{name}/nodes") < 1.5 * one.pop(f"{name}/nodes"), name
    for name, expected in one.items():
        np.testing.assert_allclose(two[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)
