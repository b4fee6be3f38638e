"""One device, two devices and two workers train the same network, each through Ray and the real loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from lungseg.config import load_recipe
from lungseg.errors import ConfigError
from lungseg.stream.patch_stream import PatchStream
from lungseg.train.strategy import require_devices, require_gpus

WAYS = {
    "mirrored": ("train.logical_cpu_devices=2",),
    "workers": ("train.workers=2",),
}
TOLERANCE = 2e-5
"""Of weights of order 1. Sums over replicas are rounded in another order: some 1e-7 a step, which 24 steps
with momentum carry on. Found: 5e-6."""


@pytest.fixture(scope="module", params=WAYS)
def other(request: pytest.FixtureRequest, balls: Any, undisturbed: str) -> str:
    balls.train(request.param, *WAYS[request.param])
    return str(request.param)


@pytest.mark.slow
def test_final_weights_do_not_depend_on_the_strategy(other: str, undisturbed: str, balls: Any) -> None:
    reference, found = balls.final(undisturbed), balls.final(other)
    assert found.state.step == reference.state.step == 24
    for path, expected in reference.weights.items():
        np.testing.assert_allclose(found.weights[path], expected, rtol=0, atol=TOLERANCE, err_msg=path)


@pytest.mark.slow
def test_every_epoch_has_the_same_loss_and_validation_dice(other: str, undisturbed: str, balls: Any) -> None:
    def epochs(run: str) -> np.ndarray:
        lines = balls.store.get(f"runs/{run}/metrics.jsonl").decode().splitlines()
        return np.array([[line["loss"], line["val_dice"]] for line in map(json.loads, lines)])

    np.testing.assert_allclose(epochs(other), epochs(undisturbed), atol=1e-5)


@pytest.mark.slow
def test_what_runs_side_by_side_shares_the_cores() -> None:
    """In processes of their own, since TensorFlow's threads are set once; they part after the long import."""
    cases = {("model.members=3", 8): [2, 3], ("train.logical_cpu_devices=2", 1): [1, 2]}
    script = (
        "import json, os, sys, tensorflow as tf; from lungseg.config import load_recipe\n"
        "from lungseg.train.strategy import make_strategy\n"
        "get = tf.config.threading\n"
        "for setting, threads in json.loads(sys.argv[1]):\n"
        "    if os.fork():\n"
        "        assert os.wait()[1] == 0\n"
        "        continue\n"
        "    make_strategy(load_recipe(None, [setting]), 1, threads)\n"
        "    each = get.get_intra_op_parallelism_threads(), get.get_inter_op_parallelism_threads()\n"
        "    print(json.dumps(each), flush=True)\n"
        "    os._exit(0)\n"
    )
    command = [sys.executable, "-c", script, json.dumps(list(cases))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(cases.values())


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_see_the_global_batches_of_one_worker(balls: Any, world_size: int) -> None:
    recipe = balls.recipe()

    def see(rank: int, world_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        with PatchStream(
            balls.store, balls.manifest, "train", recipe.stream,
            global_batch=4, rank=rank, world_size=world_size,
        ) as stream:  # fmt: skip
            batches = [batch for batch, _ in zip(stream, range(13), strict=False)]  # two passes and a bit
        assert all(batch.first_row == rank * 4 // world_size for batch in batches)
        return [(batch.image_hu, batch.mask) for batch in batches]

    alone = see(0, 1)
    for whole, *shares in zip(alone, *(see(rank, world_size) for rank in range(world_size)), strict=True):
        for column in (0, 1):
            np.testing.assert_array_equal(np.concatenate([share[column] for share in shares]), whole[column])


@pytest.mark.parametrize(("asked", "taken"), [("", True), ("0", False)])
def test_convolutions_are_those_of_onednn_on_every_cpu(asked: str, taken: bool) -> None:
    """Unless the environment says otherwise; TensorFlow alone has them from AVX-512 VNNI on only.

    The one module that knows is loaded without the seconds of the whole of TensorFlow.
    """
    script = (
        "import lungseg; from importlib import util; from pathlib import Path\n"
        "folder = Path(util.find_spec('tensorflow').origin).parent / 'python/util'\n"
        "spec = util.spec_from_file_location('_pywrap_util_port', folder / '_pywrap_util_port.so')\n"
        "module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.IsMklEnabled())\n"
    )
    kept = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    env = kept | ({"TF_ENABLE_ONEDNN_OPTS": asked} if asked else {})
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == str(taken)


@pytest.mark.parametrize(
    ("settings", "visible", "code"),
    [
        ((), 0, None),
        (("train.gpus_per_worker=2",), 2, None),
        (("train.gpus_per_worker=2",), 0, "gpus-missing"),
        (("train.gpus_per_worker=2",), 1, "gpus-missing"),
        (("train.gpus_per_worker=2",), 4, "devices-differ"),
    ],
)
def test_a_worker_trains_on_as_many_gpus_as_the_recipe_says(
    settings: tuple[str, ...], visible: int, code: str | None
) -> None:
    config = load_recipe(None, settings).train
    with pytest.raises(ConfigError, match=code) if code else nullcontext():
        require_gpus(config, visible)


def worker(setting: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A process that makes its strategy, since devices are set once, and prints the replicas."""
    script = (
        "import tensorflow as tf; from lungseg.config import load_recipe\n"
        f"from lungseg.train.strategy import make_strategy\n{before}\n"
        f"print(make_strategy(load_recipe(None, ['{setting}']), 1, None).num_replicas_in_sync)\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_gpus_that_tensorflow_does_not_see_are_an_error_and_no_training_on_the_cpu() -> None:
    done = worker("train.gpus_per_worker=1")
    assert "gpus-missing" in done.stderr.splitlines()[-1]
    assert done.returncode == 1


def test_gpus_are_hidden_from_a_run_on_cpus() -> None:
    """A mock: no GPU is here, so the call that hides them is only watched."""
    before = "hide = tf.config.set_visible_devices\n"
    before += "tf.config.set_visible_devices = lambda *given: print(given) or hide(*given)"
    assert worker("train.logical_cpu_devices=2", before).stdout.splitlines() == ["([], 'GPU')", "2"]


CPUS = ["/replica:0/task:0/device:CPU:0", "/replica:0/task:0/device:CPU:1"]


@pytest.mark.parametrize(
    ("settings", "world_size", "replicas", "devices", "fits"),
    [
        (("train.logical_cpu_devices=2",), 1, 2, CPUS, True),
        (("train.workers=2",), 2, 2, CPUS[:1], True),
        (("train.workers=2",), 2, 4, ["/device:GPU:0", "/device:GPU:1"], False),  # GPUs that nobody asked for
        (("train.gpus_per_worker=2",), 1, 2, CPUS, False),
        (("train.gpus_per_worker=2", "train.workers=2"), 2, 3, ["/device:GPU:0", "/device:GPU:1"], False),
        (("train.workers=2",), 1, 1, CPUS[:1], False),
    ],
)
def test_a_strategy_on_other_devices_than_the_recipes_is_refused(
    settings: tuple[str, ...], world_size: int, replicas: int, devices: list[str], fits: bool
) -> None:
    config = load_recipe(None, settings).train
    with nullcontext() if fits else pytest.raises(ConfigError, match="devices-differ"):
        require_devices(config, world_size, replicas, devices)
