"""Settings of augmentation."""

from __future__ import annotations

from pydantic import Field

from lungseg.config.fields import Frozen, Shape, Share


class AugmentConfig(Frozen):
    """Seeded, in-graph; every sample draws for itself. Zero switches a transform off."""

    crop_zyx: Shape | None = Field(None, description="a random crop of each patch; default: all of it")
    flips: bool = Field(True, description="mirroring along each axis")
    turns: bool = Field(True, description="90-degree turns in the axial plane")
    warp_share: Share = Field(0.2, description="samples that are rotated, scaled and deformed")
    rotation_degrees: float = Field(15.0, ge=0, le=180, description="largest angle about each axis")
    scaling: float = Field(0.15, ge=0, lt=1, description="largest relative change of size")
    elastic: float = Field(0.15, ge=0, le=0.4, description="largest shift of a control point, in spacings")
    elastic_spacing: int = Field(16, ge=4, description="voxels between control points (cubic B-splines)")
    noise_hu: float = Field(20.0, ge=0, description="largest standard deviation of added noise")
    blur_share: Share = Field(0.1, description="samples that are blurred")
    blur_voxels: float = Field(1.0, gt=0, le=2, description="largest standard deviation of the blur")
    brightness_hu: float = Field(30.0, ge=0, description="largest shift")
    contrast: float = Field(0.1, ge=0, lt=1, description="largest relative change of HU about the mean")
    gamma: float = Field(0.2, ge=0, le=1, description="largest |log| of the exponent on the HU window")
