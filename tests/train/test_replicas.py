"""One device, two and four train the same network, whatever the loss counts over.

Each number of devices has a process of its own: TensorFlow divides a CPU once, and lets strategies of
different sizes not meet in one process.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from lungseg.config import LossName

SETTINGS = [
    "model.width=2", "model.depth=2", "train.global_batch=4", "augment.warp_share=0", "optimizer.name=sgd",
    "optimizer.learning_rate=0.1", "optimizer.warmup_steps=0", "optimizer.schedule=constant",
    "optimizer.weight_decay=0",
]  # fmt: skip
CASES: dict[str, list[str]] = {
    f"{name} {reduction}": [f"loss.name={name}", f"loss.reduction={reduction}"]
    for name in get_args(LossName)
    for reduction in ("sample", "batch")
}
CASES["deep supervision"] = ["model.deep_supervision=1", "model.depth=3"]
CASES["an ensemble"] = ["model.members=2"]
CASES["compiled"] = ["train.xla=always"]

SCRIPT = """
import sys
import numpy as np
from lungseg.config import load_recipe
from lungseg.stream.patch_stream import Batch
from lungseg.train.step import Stepper
from lungseg.train.strategy import make_strategy
from test_replicas import CASES, SETTINGS
devices, out = f"train.logical_cpu_devices={sys.argv[1]}", sys.argv[2]
strategy = make_strategy(load_recipe(None, [*SETTINGS, devices]), 1, None)
random = np.random.default_rng(0)
mask = random.choice([0, 1, 255], (4, 8, 8, 8), p=[0.6, 0.3, 0.1]).astype(np.uint8)
mask[1], mask[2, :6] = 0, 255  # so that no two replicas see alike
image = (np.where(mask == 1, 0, -800) + random.normal(0, 50, mask.shape)).astype(np.int16)
found = {}
for name, settings in CASES.items():
    stepper = Stepper(load_recipe(None, [*SETTINGS, devices, *settings]), strategy, 10)
    measured = stepper.train(stepper.distribute(Batch(0, 0, image, mask)))
    found[f"{name}/loss"], found[f"{name}/norm"] = float(measured.loss), float(measured.gradient_norm)
    found |= {f"{name}/weights/{path}": array for path, array in stepper.weights().items()}
np.savez(out, **found)
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, np.ndarray]]:
    """By the number of devices: loss, norm of the gradient, and the weights after a step of plain descent,
    which tell every gradient."""
    folder, here = tmp_path_factory.mktemp("steps"), Path(__file__).parent
    for devices in (1, 2, 4):
        command = [sys.executable, "-c", SCRIPT, str(devices), str(folder / str(devices))]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return {devices: dict(np.load(folder / f"{devices}.npz")) for devices in (1, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_do_not_depend_on_the_number_of_replicas(
    case: str, devices: int, steps: dict[int, dict[str, np.ndarray]]
) -> None:
    names = [name for name in steps[1] if name.startswith(f"{case}/")]
    assert len(names) > 10
    assert steps[1][f"{case}/norm"] > 1e-3
    for name in names:
        np.testing.assert_allclose(steps[devices][name], steps[1][name], rtol=2e-5, atol=2e-6, err_msg=name)
