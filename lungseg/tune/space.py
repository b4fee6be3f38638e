"""A sweep's space: which settings it varies, whether they can train, and a trial's draw from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from lungseg.config import Recipe, parse_recipe
from lungseg.config.recipe import field_names, unknown_field
from lungseg.config.tune import Dimension
from lungseg.errors import ConfigError

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

SEARCHED = ("model", "loss", "augment", "optimizer", "train")
_EACH_ALIKE = {
    "train.workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.logical_cpu_devices",
    "train.seed",
    "train.init_from",
    "train.publish",
    "train.val_dice_mode",
}
"""What a trial runs on, and what its score means: all trials of a sweep have the same."""


def check_space(recipe: Recipe) -> None:
    """Raises ConfigError("field-unknown", "space-field", "space-order", "sampler-space", "sampler-missing");
    "field-invalid" for a value that the setting itself refuses. What only certain combinations refuse is
    found when they are drawn.
    """
    space, names = recipe.tune.space, field_names()
    for name, dimension in space.items():
        for one in (name, *dimension.when):
            if one not in names:
                raise unknown_field(one)
        if name.partition(".")[0] not in SEARCHED or "." not in name or name in _EACH_ALIKE:
            remedy = f"search settings of {', '.join(SEARCHED)}; set this one for the whole sweep"
            raise ConfigError("space-field", field=name, message="all trials have the same", remedy=remedy)
        for value in dimension.ends:
            try:
                with_values(recipe, {name: value})
            except ConfigError as error:
                if f"{error.where.get('field', '')}.".startswith(f"{name}."):
                    raise
    in_order(space)
    _check_sampler(recipe)


def _check_sampler(recipe: Recipe) -> None:
    """Whether the sampler searches such a space as one, and its library is installed."""
    sampler, space = recipe.tune.sampler, recipe.tune.space
    dependent = [name for name, dimension in space.items() if dimension.when]
    chosen = [name for name, dimension in space.items() if dimension.choice]
    odd = {"cmaes": dependent + chosen, "gp": dependent}.get(sampler, [])
    if odd or (sampler == "cmaes" and len(space) < 2):
        numbers = "two or more settings with range or log, and no `when`"
        takes = {"cmaes": numbers, "gp": "no `when`"}[sampler]
        remedy = f"{sampler} takes {takes}; tpe searches any space"
        raise ConfigError("sampler-space", sampler=sampler, fields=", ".join(odd or space), remedy=remedy)
    if sampler == "gp" and find_spec("torch") is None:
        remedy = "pip install torch, which Optuna's Gaussian process computes with, or search with tpe"
        raise ConfigError("sampler-missing", sampler=sampler, message="torch is not installed", remedy=remedy)


def in_order(space: Mapping[str, Dimension]) -> list[str]:
    """The names of the settings, each after those that its `when` asks for. Raises ConfigError("space-order")
    where they wait for each other."""
    done: list[str] = []
    while len(done) < len(space):
        ready = [
            name
            for name, dimension in space.items()
            if name not in done and all(parent in done or parent not in space for parent in dimension.when)
        ]
        if not ready:
            left = ", ".join(name for name in space if name not in done)
            raise ConfigError("space-order", fields=left, remedy="let no two of them wait for each other")
        done += ready
    return done


def draw(trial: BaseTrial, recipe: Recipe) -> dict[str, Any]:
    """A trial's settings; one whose `when` is not met is left out, and so as the recipe has it."""
    values: dict[str, Any] = {}
    for name in in_order(recipe.tune.space):
        dimension = recipe.tune.space[name]
        if all(_met(recipe, values, parent, wanted) for parent, wanted in dimension.when.items()):
            values[name] = _suggest(trial, name, dimension)
    return values


def as_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's settings as Optuna has them, whose choices are scalars: a list goes as its JSON."""
    return {name: value if _is_scalar(value) else json.dumps(value) for name, value in values.items()}


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial. Raises what `parse_recipe` raises."""
    tree = recipe.model_dump(mode="json")
    for name, value in values.items():
        *sections, last = name.split(".")
        inside = tree
        for section in sections:
            inside = inside[section]
        inside[last] = list(value) if isinstance(value, tuple) else value
    return parse_recipe(tree)


def _met(recipe: Recipe, values: Mapping[str, Any], parent: str, wanted: Any) -> bool:
    if parent in recipe.tune.space:
        return parent in values and _among(values[parent], wanted)
    return _among(_value(recipe, parent), wanted)


def _among(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple) else value == wanted


def _value(recipe: Recipe, name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _suggest(trial: BaseTrial, name: str, dimension: Dimension) -> Any:
    if dimension.choice:
        options = {as_parameters({name: one})[name]: one for one in dimension.choice}
        return options[trial.suggest_categorical(name, list(options))]
    low, high = dimension.ends
    if _is_whole(name):
        return trial.suggest_int(name, int(low), int(high), log=dimension.log is not None)
    return trial.suggest_float(name, low, high, log=dimension.log is not None)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_whole(name: str) -> bool:
    """Whether a setting's values are whole numbers."""
    kind: Any = Recipe
    for part in name.split("."):
        assert issubclass(kind, BaseModel)
        kind = kind.model_fields[part].annotation
    return kind is int or int in get_args(kind)
