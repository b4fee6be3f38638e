"""Settings of how weights are updated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lungseg.config.fields import Frozen, Positive


class OptimizerConfig(Frozen):
    """How weights are updated."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="SGD is Nesterov's")
    learning_rate: Positive = Field(1e-3, description="after the warm-up")
    reference_batch: int | None = Field(
        None, ge=1, description="learning_rate is for this global batch and grows with it; default: as it is"
    )
    weight_decay: float = Field(1e-5, ge=0, description="decoupled; not on norms and biases")
    warmup_steps: int = Field(50, ge=0, description="steps in which the learning rate rises from 0")
    schedule: Literal["constant", "cosine", "polynomial"] = Field("cosine", description="after the warm-up")
    power: Positive = Field(0.9, description="of the polynomial")
    clip_norm: float = Field(12.0, gt=0, description="global gradient norm")
    momentum: float = Field(0.99, ge=0, lt=1, description="of SGD, Nesterov")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of an average of the weights, which is then validated; 0: none",
    )
