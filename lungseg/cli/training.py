"""The verbs that make and fetch networks: train, tune, runs, pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lungseg.cli.app import app
from lungseg.cli.options import (
    STORE,
    DataName,
    Out,
    Overrides,
    RecipeFile,
    RunName,
    StoreUri,
    Submitted,
    checked_if_given,
    read_recipe,
    read_space,
)
from lungseg.errors import ConfigError
from lungseg.show import table, val_dice_text

if TYPE_CHECKING:
    from lungseg.runs.run import Mode


@app.command()
def train(
    data: DataName,
    run: RunName,
    store: StoreUri = STORE,
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run of this name.")] = False,
    new: Annotated[bool, typer.Option("--new", help="Begin the run of this name anew.")] = False,
    submitted: Submitted = None,
) -> None:
    """Train a network. Checkpoints and the best model go to the store."""
    from lungseg.storage import open_store
    from lungseg.train.launch import train as run_training

    if resume and new:
        raise ConfigError("flags-contradict", remedy="give --resume or --new, not both")
    mode: Mode = "resume" if resume else "new" if new else "fresh"
    settings = read_recipe(recipe, overrides, store, submitted)
    best = run_training(open_store(store), data, run, settings, mode)
    print(f"published: {val_dice_text(best.val_dice)} after epoch {best.epoch}, {best.checkpoint}")
    print(f"get it with: lungseg pull --store {store} --run {run} --out DIR")


@app.command()
def tune(
    data: DataName,
    run: RunName,
    trials: Annotated[int | None, typer.Option(min=1, help="How many trials, or --minutes.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Begin no more, and end, after.")] = None,
    store: StoreUri = STORE,
    recipe: RecipeFile = None,
    space: Annotated[Path | None, typer.Option("--space", help="YAML file of tune.space.")] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep of this name.")] = False,
    warm_start: Annotated[
        str | None,
        typer.Option("--warm-start", callback=checked_if_given, help="Learn from this earlier sweep."),
    ] = None,
    submitted: Submitted = None,
) -> None:
    """Search settings (tune.space). The best trial becomes the run's best."""
    from lungseg.storage import open_store
    from lungseg.tune.search import tune as search
    from lungseg.tune.table import HEADER, cells

    if trials is None and minutes is None:
        raise ConfigError("budget-missing", remedy="give --trials, --minutes or both")
    settings = read_recipe(recipe, [*read_space(space), *(overrides or [])], store, submitted)
    mode: Mode = "resume" if resume else "fresh"
    rows = search(open_store(store), data, run, settings, trials, mode, minutes, warm_start)
    print(table(HEADER, [cells(row) for row in rows]))
    print(f"get the best with: lungseg pull --store {store} --run {run} --out DIR")


@app.command()
def runs(store: StoreUri = STORE) -> None:
    """List the runs of a store with their best validation Dice."""
    from lungseg.runs.run import list_runs
    from lungseg.storage import open_store

    opened = open_store(store)
    opened.check()
    rows = []
    for run, best in list_runs(opened):
        dice = val_dice_text(best.val_dice).removeprefix("val Dice ") if best else "-"
        rows.append((run.name, run.kind, run.data, dice, str(best.epoch) if best else "-", run.created))
    print(table(("run", "kind", "data", "val Dice", "epoch", "created"), rows))


@app.command()
def pull(
    run: RunName,
    out: Out,
    store: StoreUri = STORE,
    onnx: Annotated[bool, typer.Option("--onnx", help="model.onnx too; needs lungseg[onnx].")] = False,
    saved_model: Annotated[
        bool, typer.Option("--saved-model", help="TensorFlow's saved_model/ too.")
    ] = False,
) -> None:
    """Copy the best checkpoint of a run to a folder.

    model.keras needs lungseg; --onnx and --saved-model, with serving.json beside, need no lungseg.
    """
    from lungseg.runs.run import pull_best
    from lungseg.runs.serving import require_onnx, write_serving
    from lungseg.storage import open_store
    from lungseg.telemetry import quiet_tensorflow

    if onnx:
        require_onnx()
    opened = open_store(store)
    best = pull_best(opened, run, out)
    print(f"{out / 'model.keras'}: {val_dice_text(best.val_dice)}, epoch {best.epoch}")
    if onnx or saved_model:
        with quiet_tensorflow():
            written = write_serving(opened, run, out, onnx=onnx, saved_model=saved_model)
        print(*written, sep="\n")
