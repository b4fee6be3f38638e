"""The whole tree of settings, read from a YAML file and `--set a.b=c`.

Unknown fields are refused with the nearest valid name, since a misspelt setting that is silently ignored
costs a night of training.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from lungseg.config.augment import AugmentConfig
from lungseg.config.data import DataConfig
from lungseg.config.fields import Frozen
from lungseg.config.loss import LossConfig
from lungseg.config.model import ModelConfig
from lungseg.config.optimizer import OptimizerConfig
from lungseg.config.segment import SegmentConfig
from lungseg.config.stream import StreamConfig
from lungseg.config.telemetry import TelemetryConfig
from lungseg.config.train import CheckpointConfig, TrainConfig
from lungseg.config.tune import TuneConfig
from lungseg.config.yaml12 import read_yaml
from lungseg.errors import ConfigError


class Recipe(Frozen):
    """The whole tree. Every field has a default, so an empty recipe is a valid one."""

    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    train: TrainConfig = TrainConfig()
    segment: SegmentConfig = SegmentConfig()
    tune: TuneConfig = TuneConfig()
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)


def load_recipe(path: Path | str | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of a YAML file (or the defaults) with `a.b=c` overrides, c being a YAML value.

    Raises ConfigError: "recipe-missing", "recipe-syntax", "override-syntax", "field-unknown",
    "field-invalid".
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = read_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "recipe-missing", recipe=path, remedy=f"give a readable YAML file ({error})"
            ) from error
        except yaml.YAMLError as error:
            detail = " ".join(str(error).split())
            raise ConfigError("recipe-syntax", recipe=path, message=detail, remedy="correct it") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError("recipe-syntax", recipe=path, remedy="a recipe is a mapping of sections")
        tree = loaded or {}
    for override in overrides:
        _apply(tree, override)
    return parse_recipe(tree)


def resegmented(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with other settings of `segment`, the only ones that a trained network leaves open.

    Raises ConfigError("setting-fixed") for any other, and as `load_recipe`.
    """
    tree = recipe.model_dump(mode="json")
    for override in overrides:
        if not override.strip().startswith("segment."):
            remedy = "set segment.… only (see `lungseg settings segment`); all else is the network's own"
            raise ConfigError("setting-fixed", override=override, remedy=remedy)
        _apply(tree, override)
    return parse_recipe(tree)


def parse_recipe(tree: dict[str, Any]) -> Recipe:
    """Validate a plain tree. Raises ConfigError("field-unknown" or "field-invalid")."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            inside = first["input"]
            while isinstance(inside, dict) and len(inside) == 1:  # of a section that is unknown itself
                [(name, inside)] = inside.items()
                field += f".{name}"
            raise unknown_field(field) from None
        # pydantic says "Value error, …" for our own validators.
        detail = first["msg"].removeprefix("Value error, ")
        where = {"field": field, "value": first["input"] if field else ""}
        quotes = "put it in quotes, or " if first["type"] == "string_type" else ""
        setting = max(
            (name for name in field_names() if f"{field}.".startswith(f"{name}.")), key=len, default=""
        )
        remedy = f"{quotes}see `{f'lungseg settings {setting}'.rstrip()}`"
        raise ConfigError("field-invalid", message=detail, remedy=remedy, **where) from None


def field_names(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Dotted names of every setting, sections included."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def unknown_field(field: str) -> ConfigError:
    """Its remedy names the field of that name in other letters, or those of the same last name in other
    sections, or else the one most alike."""
    names = {name.lower(): name for name in field_names()}
    sought = field.lower()
    last = sought.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    found = [sought] if sought in names else same or difflib.get_close_matches(sought, names, n=1, cutoff=0.5)
    meant = " or ".join(names[name] for name in found)
    remedy = f"did you mean {meant}?" if meant else "see `lungseg settings`"
    return ConfigError("field-unknown", field=field, remedy=remedy)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError("override-syntax", override=override, remedy="write --set section.field=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(
                "override-syntax", override=override, remedy=f"{section} is a value, not a section"
            )
        tree = child
    try:
        tree[last] = read_yaml(text)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        remedy = "the value must be valid YAML"
        raise ConfigError("override-syntax", override=override, message=detail, remedy=remedy) from error
