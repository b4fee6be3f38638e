"""Where a run stands besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

from lungseg.config import TrainConfig


@dataclass(frozen=True)
class TrainState:
    """`step` counts optimiser updates, `epoch` finished epochs.

    The rest follows from these: learning rate and patches from (seed, step), random draws from (seed, step,
    row). `metrics` are those of the last finished epoch; `losses`, `train_seconds` and `data_wait_seconds`
    belong to the epoch under way, of which `losses` has one a step. `claim` is the number of the lease
    under which it was written; `recipe` a tree as `config.stored` writes it,
    `data` the name of the data set, empty in states of format 1.
    """

    attempt: str
    step: int
    epoch: int
    manifest_sha256: str
    recipe: dict[str, Any]
    best_val_dice: float | None = None
    epochs_without_gain: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    train_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    claim: int = 0
    data: str = ""

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        state = cls(**tree)
        return replace(state, best_val_dice=validated(state.best_val_dice))

    @property
    def val_dice(self) -> float | None:
        """Of the weights that go with this state; None where nobody has validated them: within an epoch, or
        where there are no validation patches."""
        return None if self.losses or not self.epoch else self.metrics.get("val_dice")

    def last_epoch(self, config: TrainConfig) -> int:
        """The epoch that ends the run: the recipe's last, or the last that fits into its minutes if those to
        come take as long as the latest without the tracing of its graph."""
        if config.max_minutes is None or not self.epoch:
            return config.epochs
        of_one = self.metrics["train_seconds"] + self.metrics["val_seconds"]
        of_one = max(of_one - self.metrics.get("graph_seconds", 0.0), 1e-3)
        left = max(0.0, config.max_minutes * 60 - self.seconds)
        return min(config.epochs, self.epoch + int(left / of_one))

    def ended(self, config: TrainConfig) -> bool:
        """Whether the run has its epochs, or time for no more, or stopped gaining."""
        if self.losses:
            return False
        return self.epoch >= self.last_epoch(config) or self.epochs_without_gain >= config.patience_epochs


def validated(val_dice: float | None) -> float | None:
    """A stored Dice. Runs of format 1 wrote -1 where nobody had validated."""
    return None if val_dice is None or val_dice < 0 else val_dice


def rank(val_dice: float | None) -> float:
    """To sort by: what nobody has validated comes below any Dice."""
    return -1.0 if val_dice is None else val_dice
