"""Settings of hyper-parameter search."""

from __future__ import annotations

from pydantic import Field, model_validator

from lungseg.config.fields import Frozen, LossName, Positive, Width


class TuneConfig(Frozen):
    """The search space of `lungseg tune`: lists are choices, pairs of floats log-uniform bounds."""

    learning_rate: tuple[Positive, Positive] = Field((1e-4, 1e-2), description="lowest and highest")
    loss: tuple[LossName, ...] = Field(
        ("dice", "dice_bce", "dice_focal"), min_length=1, description="choices"
    )
    width: tuple[Width, ...] = Field((8, 16), min_length=1, description="choices for model.width")
    grace_epochs: int = Field(2, ge=1, description="ASHA stops no trial before")
    reduction_factor: int = Field(3, ge=2, description="ASHA goes on with one trial in so many")
    concurrent_trials: int | None = Field(None, ge=1, description="default: what the cluster can place")

    @model_validator(mode="after")
    def _range_is_open(self) -> TuneConfig:
        if self.learning_rate[0] >= self.learning_rate[1]:
            raise ValueError("learning_rate must rise: the first value is the lowest")
        return self
