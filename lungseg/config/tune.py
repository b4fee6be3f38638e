"""Settings of hyper-parameter search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lungseg.config.fields import Frozen, Positive

Number = int | float


class Dimension(Frozen):
    """The values of one setting that a sweep tries: exactly one of `choice`, `range` and `log`."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="any of these")
    range: tuple[Number, Number] | None = Field(None, description="lowest and highest, evenly")
    log: tuple[Positive, Positive] | None = Field(None, description="lowest and highest, by their logarithm")
    when: dict[str, Any] = Field(
        {}, description="searched only where these settings have this value, or one of these values"
    )

    @field_validator("range", "log", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:  # among choices it is a value
        if isinstance(value, list | tuple) and any(one is True or one is False for one in value):
            raise ValueError("true and false are no numbers")
        return value

    @model_validator(mode="after")
    def _one_kind_that_rises(self) -> Dimension:
        kinds = [kind for kind in (self.choice, self.range, self.log) if kind is not None]
        if len(kinds) != 1:
            raise ValueError("give exactly one of choice, range and log")
        for bounds in filter(None, (self.range, self.log)):
            if bounds[0] >= bounds[1]:
                raise ValueError("the first value is the lowest, the second the highest")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the lowest and the highest value."""
        return self.choice or self.range or self.log or ()


def _default_space() -> dict[str, Dimension]:
    return {
        "optimizer.learning_rate": Dimension(log=(1e-4, 1e-2)),
        "loss.name": Dimension(choice=("dice", "dice_bce", "dice_focal")),
        "model.width": Dimension(choice=(8, 16)),
    }


class TuneConfig(Frozen):
    """What `lungseg tune` searches, and how."""

    space: dict[str, Dimension] = Field(
        default_factory=_default_space,
        min_length=1,
        description="values of any setting of model, loss, augment, optimizer and train, by its name",
    )
    sampler: Literal["tpe", "gp", "cmaes", "random"] = Field(
        "tpe",
        description="tree-structured Parzen estimator, Gaussian process (needs torch), CMA-ES (numbers only)",
    )
    pruner: Literal["asha", "median", "none"] = Field("asha", description="which trials are stopped early")
    scan_seconds: bool = Field(
        False, description="a second objective: few seconds a scan; needs pruner=none, and tpe, gp or random"
    )
    grace_epochs: int = Field(2, ge=1, description="no trial is stopped before")
    reduction_factor: int = Field(3, ge=2, description="ASHA goes on with one trial in so many")
    concurrent_trials: int | None = Field(
        None, ge=1, description="default: what the cluster can place; cores are shared out evenly"
    )
    retries: int = Field(1, ge=0, description="how often a trial that failed goes on from its checkpoint")
    seeds: int = Field(1, ge=1, description="seeds of which each of the best trials must be good on average")
    seeds_best: int = Field(3, ge=1, description="how many of the best trials are repeated with other seeds")
    keep_trials: int = Field(5, ge=1, description="so many of the best keep their checkpoints")

    @field_validator("space", mode="before")
    @classmethod
    def _by_dotted_names(cls, space: Any) -> Any:
        """`--set tune.space.model.width=…` makes a section "model": names are joined again."""
        return dict(_flat(space, "")) if isinstance(space, Mapping) else space

    @model_validator(mode="after")
    def _two_objectives(self) -> TuneConfig:
        if self.scan_seconds and self.pruner != "none":
            raise ValueError("by the second objective, scan_seconds, no trial is stopped early: pruner=none")
        if self.scan_seconds and self.sampler == "cmaes":
            raise ValueError("cmaes does not search for a second objective, scan_seconds: take tpe")
        return self


def _flat(tree: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value and not value.keys() & Dimension.model_fields.keys():
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
