"""The run that distributed and disturbed runs are compared with; it takes a worker's start, so once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from helpers.balls import write_balls

from lungseg.config import Recipe, load_recipe
from lungseg.dataset.manifest import Manifest
from lungseg.runs.checkpoint import Checkpoint, Checkpoints
from lungseg.storage import Store, open_store

SETTINGS = (
    "model.width=2",
    "model.depth=2",
    "loss.reduction=sample",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.1",
    "optimizer.momentum=0.9",
    "optimizer.warmup_steps=2",
    "train.epochs=4",
    "train.global_batch=4",
    "train.cpus_per_worker=1",
    "train.precision=float32",
)
"""24 steps on the balls. SGD, since its update is linear in the gradient: Adam divides by the gradient's
own size, and so turns the rounding of a gradient near 0 into a full step. A loss per sample, since that of a
whole batch carries rounding on further: two workers' losses were 4e-5 apart after 24 steps."""


@dataclass(frozen=True)
class Balls:
    """A store with the data set "balls", and runs on it."""

    store: Store
    manifest: Manifest

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(None, [*SETTINGS, *overrides])

    def train(self, run: str, *overrides: str, mode: Any = "fresh") -> dict[str, Any]:
        from lungseg.train.launch import train

        return train(self.store, "balls", run, self.recipe(*overrides), mode)

    def final(self, run: str) -> Checkpoint:
        """The newest checkpoint of a run, whichever attempt wrote it."""
        from lungseg.runs.run import load_run

        found = Checkpoints(self.store, f"runs/{run}").newest(load_run(self.store, run).attempt)
        assert found is not None
        return found


@pytest.fixture(scope="session")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Balls:
    store = open_store(tmp_path_factory.mktemp("store"))
    return Balls(store, write_balls(store))


@pytest.fixture(scope="session")
def undisturbed(balls: Balls, ray_cluster: Any) -> str:
    """The name of a finished run of one worker with one device."""
    balls.train("undisturbed")
    return "undisturbed"
