"""Settings of the loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lungseg.config.fields import Frozen, LossName, Share


class LossConfig(Frozen):
    """What training makes small."""

    name: LossName = Field("dice_bce", description="names with _ add two losses, but focal_tversky is one")
    focal_gamma: float = Field(2.0, ge=0, description="how little easy voxels count in focal losses")
    tversky_alpha: Share = Field(0.3, description="weight of false positives; misses weigh 1 - alpha")
    reduction: Literal["sample", "batch"] = Field(
        "batch", description="Dice and Tversky of each patch, or of the global batch as one volume"
    )
