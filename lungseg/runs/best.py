"""best.json: which checkpoint of a run is published."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Self

from lungseg.runs.state import TrainState, rank, validated


@dataclass(frozen=True)
class Best:
    """The published checkpoint: the best over all attempts on one data set, or the last epoch where the
    recipe says so. `val_dice` is None where nobody has validated it; `model_sha256` is the digest of
    best/model.keras; `data` and `manifest_sha256` are the data set that it was trained on."""

    checkpoint: str
    attempt: str
    epoch: int
    step: int
    val_dice: float | None
    metrics: dict[str, float]
    model_sha256: str
    data: str
    manifest_sha256: str

    @classmethod
    def of(cls, checkpoint: str, state: TrainState, model_keras: bytes) -> Self:
        return cls(
            checkpoint=checkpoint,
            attempt=state.attempt,
            epoch=state.epoch,
            step=state.step,
            val_dice=state.val_dice,
            metrics=state.metrics,
            model_sha256=hashlib.sha256(model_keras).hexdigest(),
            data=state.data,
            manifest_sha256=state.manifest_sha256,
        )

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """Pointers of format 1 do not name their data set."""
        return cls(**{"data": "", **tree, "val_dice": validated(tree["val_dice"])})

    def beaten_by(self, state: TrainState) -> bool:
        """Whether a state is better. On other data, or with other patients to validate on, a Dice says
        nothing about this one: the newer network then takes its place."""
        if state.val_dice is None:
            return False
        return self.manifest_sha256 != state.manifest_sha256 or state.val_dice > rank(self.val_dice)
