"""Settings as runs keep them in the store, to be read by every later version.

Settings compare by meaning: one that a stored tree lacks has the default of the version that wrote it. So
whoever changes a default, renames or removes a setting raises FORMAT and says in `_MIGRATIONS` what trees
of the format before mean now; a setting that is merely added, and whose default is what was done before,
needs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lungseg.config.recipe import Recipe, parse_recipe
from lungseg.errors import ConfigError

FORMAT = 4


def store_recipe(recipe: Recipe) -> dict[str, Any]:
    """A plain tree that tells its format."""
    return {"format": FORMAT, **recipe.model_dump(mode="json")}


def stored_recipe(tree: dict[str, Any]) -> Recipe:
    """The recipe of a tree of any format up to this version's. Raises ConfigError("recipe-newer")."""
    tree = copy.deepcopy(tree)
    written = tree.pop("format", 1)
    if written > FORMAT:
        remedy = "read it with the version of lungseg that wrote it, or a later one"
        raise ConfigError("recipe-newer", format=written, known=FORMAT, remedy=remedy)
    for number in range(written, FORMAT):
        _MIGRATIONS[number](tree)
    return parse_recipe(tree)


def _from_1(tree: dict[str, Any]) -> None:
    train = tree.get("train", {})
    if "val_dice" in train:
        train["val_dice_mode"] = train.pop("val_dice")
    if train.get("workers", 1) > 1 or train.get("gpus_per_worker", 0):
        train["logical_cpu_devices"] = 1  # it did nothing there, and is refused now


def _from_2(tree: dict[str, Any]) -> None:
    tune = tree.get("tune", {})
    tune["space"] = {
        "optimizer.learning_rate": {"log": tune.pop("learning_rate", (1e-4, 1e-2))},
        "loss.name": {"choice": tune.pop("loss", ("dice", "dice_bce", "dice_focal"))},
        "model.width": {"choice": tune.pop("width", (8, 16))},
    }
    tune["sampler"] = "random"
    tree["tune"] = tune


def _from_3(tree: dict[str, Any]) -> None:
    tree.setdefault("segment", {}).setdefault("candidate_score", "max")


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], None]] = {1: _from_1, 2: _from_2, 3: _from_3}
