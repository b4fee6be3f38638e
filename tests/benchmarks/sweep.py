"""What a sweep's sampler and pruner are worth: the best score after equal epochs of training, five seeds.

    uv run python tests/benchmarks/sweep.py [--seeds 5] [--epochs 540]

The objective is a surface, not a training: its trials cost nothing, so that seeds can be many. Its ridge in
learning rate and weight decay, its conditional setting and its slow curves are as those of a network; what it
says of real sweeps is the order of the methods, no more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.config import load_recipe
from lungseg.storage import FolderStore
from lungseg.tune.trials import Trials

EPOCHS = 27
NOISE = 0.01
SETTINGS = (
    "tune.space.optimizer.learning_rate={log: [1.0e-5, 1.0e-1]}",
    "tune.space.optimizer.weight_decay={log: [1.0e-6, 1.0e-1]}",
    "tune.space.model.width={choice: [4, 8, 16, 32]}",
    "tune.space.loss.name={choice: [dice, dice_bce, dice_focal]}",
    "tune.space.loss.focal_gamma={range: [0.5, 5], when: {loss.name: dice_focal}}",
    "tune.space.augment.warp_share={range: [0, 1]}",
    "tune.grace_epochs=3",
    "tune.reduction_factor=3",
)
METHODS = {
    "random": ("tune.sampler=random", "tune.pruner=none"),
    "random, ASHA": ("tune.sampler=random", "tune.pruner=asha"),
    "TPE": ("tune.sampler=tpe", "tune.pruner=none"),
    "TPE, ASHA": ("tune.sampler=tpe", "tune.pruner=asha"),
}


def summit(values: Mapping[str, Any]) -> float:
    """The Dice that a trial would reach: at most 0.8, at a learning rate of 2e-3, a weight decay of 1e-3, 16
    channels, the focal loss with a gamma of 2 and a third of the patches warped."""
    rate = math.log10(values["optimizer.learning_rate"] / 2e-3)
    decay = math.log10(values["optimizer.weight_decay"] / 1e-3)
    loss = {"dice": 0.06, "dice_bce": 0.03, "dice_focal": 0.02 * abs(values.get("loss.focal_gamma", 0) - 2)}
    lost = 0.12 * rate**2 + 0.015 * (decay - rate) ** 2 + loss[values["loss.name"]]
    lost += {4: 0.08, 8: 0.03, 16: 0.0, 32: 0.02}[values["model.width"]]
    lost += 0.1 * (values["augment.warp_share"] - 1 / 3) ** 2
    return max(0.0, 0.8 - lost)


def search(method: str, seed: int, budget: int, folder: Path) -> list[float]:
    """The true Dice of the best trial so far, after each epoch of the budget."""
    recipe = load_recipe(None, [*SETTINGS, *METHODS[method], f"train.seed={100 * seed}"])
    folder.mkdir()
    trials = Trials(FolderStore(folder / "store"), "runs/sweep", recipe, folder)
    random, best, reached = np.random.default_rng(seed), (-1.0, 0.0), []
    while len(reached) < budget:
        trial = trials.begin(lambda recipe: None)
        top, state = summit(trial.values), "complete"
        for epoch in range(1, EPOCHS + 1):
            seen = top * (1 - math.exp(-epoch / 6)) + random.normal(0, NOISE)
            best = max(best, (seen, top))
            reached.append(best[1])
            if len(reached) == budget:
                return reached
            if not trials.report(trial.number, epoch, seen, 0.0) and epoch < EPOCHS:
                state = "pruned"
                break
        trials.end(trial.number, state)
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20 * EPOCHS, help="of each sweep, all trials together")
    options = parser.parse_args()
    at = [options.epochs // 4, options.epochs // 2, options.epochs]
    print("| method | " + " | ".join(f"after {epochs} epochs" for epochs in at) + " |\n|---|--:|--:|--:|")
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            curves = [
                search(method, seed, options.epochs, Path(folder) / str(seed))
                for seed in range(options.seeds)
            ]
        cells = []
        for epochs in at:
            found = [curve[epochs - 1] for curve in curves]
            cells.append(f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
