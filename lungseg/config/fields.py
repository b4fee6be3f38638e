"""The kinds of values that settings have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Codec = Literal["raw", "lz4", "zstd", "planes-lz4", "planes-zstd"]
LossName = Literal["dice", "bce", "dice_bce", "dice_focal", "focal", "tversky", "focal_tversky"]
CandidateScore = Literal["max", "mean", "p95", "volume_weighted"]
LidcMask = Literal["consensus", "union", "reader1", "reader2", "reader3", "reader4"]
Label = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
SMALLEST_SPACING_MM, LARGEST_SPACING_MM = 0.1, 20.0  # what is in metres, centimetres or microns is not
Spacing = Annotated[float, Field(ge=SMALLEST_SPACING_MM, le=LARGEST_SPACING_MM)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=1, le=1024)]
Shape = tuple[Side, Side, Side]
Width = Annotated[int, Field(ge=2)]
Blocks = Annotated[int, Field(ge=1, le=16)]
Seed = Annotated[int, Field(ge=0, lt=1 << 31)]


class Frozen(BaseModel):
    """A section of the tree: it cannot be changed, and knows its own fields only."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1: a number of epochs, or a width in a list, that nobody meant."""
        assert info.field_name is not None
        values = value if isinstance(value, list | tuple) else [value]
        if cls.model_fields[info.field_name].annotation is not bool and any(
            v is True or v is False for v in values
        ):
            raise ValueError("true and false are no values of this setting")
        return value
