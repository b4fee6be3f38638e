"""Settings of the network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lungseg.config.fields import Blocks, Frozen, Width


class ModelConfig(Frozen):
    """A 3D U-Net."""

    architecture: Literal["unet", "resenc"] = Field("unet", description="resenc: residual encoder")
    width: Width = Field(16, description="channels of the first level; doubles at each level")
    max_width: Width = Field(320, description="no level has more channels")
    depth: int = Field(4, ge=2, le=7, description="resolution levels")
    norm: Literal["instance", "group", "batch", "none"] = Field(
        "instance", description='"batch" keeps statistics that differ between replicas'
    )
    downsampling: Literal["pool", "stride"] = Field("pool", description="of unet; resenc has strides")
    residual_blocks: tuple[Blocks, ...] = Field((1, 2, 3, 3, 3, 3, 3), description="of resenc, at each level")
    deep_supervision: int = Field(0, ge=0, le=4, description="coarser levels with a loss of their own")
    members: int = Field(
        1, ge=1, le=16, description="networks of an ensemble, trained side by side; the mean is published"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the deepest channels dropped in training")
    hu_window: tuple[float, float] = Field(
        (-1000.0, 400.0), description="HU mapped to -1 and 1, clipped beyond"
    )

    @property
    def total_stride(self) -> int:
        """Every side of an input must be a multiple of this."""
        return 2 ** (self.depth - 1)

    @model_validator(mode="after")
    def _levels_are_there(self) -> ModelConfig:
        if self.deep_supervision > self.depth - 2:
            raise ValueError(f"deep_supervision must be at most depth - 2, here {self.depth - 2}")
        if self.architecture == "resenc" and len(self.residual_blocks) < self.depth:
            raise ValueError(f"residual_blocks must name {self.depth} levels, as model.depth")
        return self

    @model_validator(mode="after")
    def _window_is_open(self) -> ModelConfig:
        if self.hu_window[0] >= self.hu_window[1]:
            raise ValueError("hu_window must rise: the first value is mapped to -1, the second to 1")
        return self
