"""What a search found: its trials by score, and the winner as the run's best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lungseg.runs.checkpoint import Checkpoints
from lungseg.storage import Store, keys


@dataclass(frozen=True)
class Trial:
    """One trial: `epochs` it was given before ASHA stopped it, `val_dice` of its best epoch."""

    trial: str
    learning_rate: float
    loss: str
    width: int
    epochs: int
    val_dice: float


def ranked(store: Store, root: str, results: Sequence[Any]) -> list[Trial]:
    rows = []
    for result in results:
        name = result.metrics["trial_id"]
        best = Checkpoints(store, keys.trial_root(root, name)).best()
        if best and best.val_dice is not None:
            epochs = int(result.metrics["epoch"])
            rows.append(Trial(name, epochs=epochs, val_dice=best.val_dice, **result.config))
    return sorted(rows, key=lambda row: (-row.val_dice, row.trial))


def promote(store: Store, root: str, best: Trial) -> None:
    """Copy the winner's best checkpoint to the run, so that every verb finds it as any run's."""
    trial_root = keys.trial_root(root, best.trial)
    pointer = Checkpoints(store, trial_root).best()
    assert pointer is not None
    won = Checkpoints(store, trial_root).read(pointer.checkpoint)
    run = Checkpoints(store, root)
    name = run.commit(won.state, won.weights, won.optimizer)
    run.publish_best(name, won.state, store.get(keys.best_model(trial_root)))
