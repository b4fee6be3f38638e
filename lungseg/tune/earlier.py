"""What an earlier sweep has tried, as knowledge of a new one."""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lungseg.config import Recipe
from lungseg.dataset.manifest import Manifest
from lungseg.errors import RunError
from lungseg.runs.run import load_run
from lungseg.storage import Store, keys
from lungseg.tune.space import as_parameters, draw


def earlier_trials(store: Store, run: str, manifest: Manifest, recipe: Recipe) -> list[FrozenTrial]:
    """The trials of the sweep `run` that ended, as far as they lie in the present space.

    Raises RunError("run-missing", "warm-start-differs") for what is no sweep, or on another data set, whose
    scores say nothing here, and where no trial fits.
    """
    found = load_run(store, run)
    if found.kind != "tune" or found.manifest_sha256 != manifest.sha256:
        why = "it is no sweep" if found.kind != "tune" else f"it searched on {found.data}, as it was then"
        raise RunError("warm-start-differs", run=run, message=why, remedy="name a sweep on the same data set")
    key = keys.trials(keys.run_root(run))
    rows = [json.loads(line) for line in store.get(key).splitlines()] if store.exists(key) else []
    trials = [trial for row in rows if (trial := _known(row, run, recipe))]
    if not trials:
        remedy = "search settings and values of that sweep, or leave --warm-start out"
        message = f"none of its {len(rows)} trials has ended and lies in this space"
        raise RunError("warm-start-differs", run=run, message=message, remedy=remedy)
    return trials


def _known(row: dict[str, Any], run: str, recipe: Recipe) -> FrozenTrial | None:
    if row["state"] not in ("complete", "pruned") or row["repeats"]:
        return None
    space, values = recipe.tune.space, row["values"]
    numbers = {name: space[name].ends for name in values if name in space and not space[name].choice}
    if not all(low <= values[name] <= high for name, (low, high) in numbers.items()):
        return None
    fixed = optuna.trial.FixedTrial(as_parameters(values))
    try:
        if draw(fixed, recipe) != values:
            return None
    except ValueError:  # a setting that it did not have, or a choice that is none now
        return None
    curve = {int(epoch): dice for epoch, dice in row["curve"].items()}
    scores, attributes = [max(curve.values())], {"values": values, "seed": row["seed"]}
    if recipe.tune.scan_seconds:
        if row.get("scan_seconds") is None:
            return None
        scores.append(row["scan_seconds"])
        attributes["scan_seconds"] = row["scan_seconds"]
    return optuna.create_trial(
        state=TrialState[row["state"].upper()],
        values=scores if row["state"] == "complete" else None,
        params=fixed.params,
        distributions=fixed.distributions,
        intermediate_values=curve,
        user_attrs={**attributes, "earlier": f"{run}/{row['number']:04d}"},
    )
