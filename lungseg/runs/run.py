"""A run's name in the store: claimed once, continued on purpose, never overwritten by accident."""

from __future__ import annotations

import hashlib
import platform
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lungseg.config import Recipe
from lungseg.config.stored import store_recipe, stored_recipe
from lungseg.dataset.manifest import Manifest, load_manifest, prepared_as
from lungseg.errors import DataError, RunError, StorageError
from lungseg.runs.best import Best
from lungseg.runs.checkpoint import STATE, WEIGHTS, Checkpoints
from lungseg.runs.fit import check_fit, on_data
from lungseg.storage import FolderStore, Store, keys, to_json

Mode = Literal["fresh", "resume", "new"]
Kind = Literal["train", "tune"]


@dataclass(frozen=True)
class Run:
    """run.json: what a run trains on and how. `attempt` tells checkpoints of a `--new` from older ones;
    `init` is the checkpoint of another run ("run/checkpoint") that it began with."""

    name: str
    attempt: str
    data: str
    manifest_sha256: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    created: str
    kind: Kind = "train"
    init: str = ""

    def fits(self, manifest: Manifest, recipe: Recipe, kind: Kind) -> bool:
        """Whether a checkpoint of this run can be trained on: with the same network, and in the same order
        of patches, which counts in global batches and is drawn from the seed."""
        old = stored_recipe(self.recipe)
        return (kind, manifest.sha256, recipe.model, recipe.train.global_batch, recipe.train.seed) == (
            self.kind, self.manifest_sha256, old.model, old.train.global_batch, old.train.seed,
        )  # fmt: skip


def open_run(
    store: Store, name: str, manifest: Manifest, recipe: Recipe, mode: Mode, kind: Kind = "train"
) -> Run:
    """Claim a name ("fresh"), continue it ("resume", which starts it if need be) or begin it anew ("new",
    which keeps older checkpoints and, on the same data set, the best over all attempts).

    Raises what `on_data`, `check_fit` and `initial_checkpoint` raise; RunError("run-exists") for "fresh" on a
    taken name; RunError("run-differs") for "resume" where the run does not fit (see Run.fits).
    """
    recipe = on_data(recipe, manifest)
    check_fit(manifest, recipe, kind)
    key = keys.run(keys.run_root(name))
    going_on = mode == "resume" and run_exists(store, name)
    now = datetime.now(UTC)
    run = Run(
        name=name,
        attempt=f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        data=manifest.name,
        manifest_sha256=manifest.sha256,
        recipe=store_recipe(recipe),
        versions=_versions(),
        created=now.isoformat(timespec="seconds"),
        kind=kind,
        init="" if going_on else initial_checkpoint(store, recipe),
    )
    if store.put_if_absent(key, to_json(asdict(run))):
        return run
    if mode == "fresh":
        raise _taken(store, name)
    if mode == "resume":
        old = load_run(store, name)
        if not old.fits(manifest, recipe, kind):
            was = stored_recipe(old.recipe).train
            raise RunError(
                "run-differs",
                run=name,
                message="other data, network, verb, train.global_batch or train.seed",
                remedy=f"give the same --data, network, train.global_batch={was.global_batch} and "
                f"train.seed={was.seed} as before, or begin anew with --new",
            )
        kept = {"attempt": old.attempt, "created": old.created, "init": old.init}
        run = Run(**{**asdict(run), **kept})
    store.put(key, to_json(asdict(run)))
    return run


def initial_checkpoint(store: Store, recipe: Recipe) -> str:
    """The checkpoint ("run/checkpoint") that `train.init_from` names, or "".

    Raises RunError("run-missing", "no-checkpoint", "init-differs").
    """
    source = recipe.train.init_from
    if not source:
        return ""
    load_run(store, source)
    best = Checkpoints(store, keys.run_root(source)).read_best()
    if stored_recipe(best.state.recipe).model != recipe.model:
        remedy = "give the same model settings as that run, or choose another train.init_from"
        raise RunError("init-differs", init_from=source, message="another network", remedy=remedy)
    return f"{source}/{best.name}"


def refuse_taken(store: Store, name: str, mode: Mode) -> None:
    """What `open_run` would refuse, told without claiming the name: before Ray takes its seconds.

    Raises RunError("run-exists").
    """
    if mode == "fresh" and run_exists(store, name):
        raise _taken(store, name)


def run_exists(store: Store, name: str) -> bool:
    return store.exists(keys.run(keys.run_root(name)))


def _taken(store: Store, name: str) -> RunError:
    remedy = "continue it with --resume, begin it anew with --new, or choose another --run name"
    return RunError("run-exists", run=name, store=store.uri, remedy=remedy)


def load_run(store: Store, name: str) -> Run:
    """Raises RunError("run-missing") with the names that exist."""
    if not run_exists(store, name):
        known = ", ".join(store.folders(keys.RUNS)) or "none"
        raise RunError("run-missing", run=name, store=store.uri, remedy=f"choose one of: {known}")
    return Run(**store.get_json(keys.run(keys.run_root(name))))


def load_run_data(store: Store, name: str) -> Manifest:
    """The data set that the published network of a run was trained on.

    Raises RunError("run-missing"), DataError("data-missing"), RunError("data-changed").
    """
    run = load_run(store, name)
    best = Checkpoints(store, keys.run_root(name)).best()
    # A run begun anew on other data has, until its first epoch, the best of the data set before.
    data, sha256 = (best.data or run.data, best.manifest_sha256) if best else (run.data, run.manifest_sha256)
    manifest = load_manifest(store, data)
    if manifest.sha256 != sha256:
        remedy = "the held-out scans may be others now: train again on this data set"
        raise RunError("data-changed", run=name, data=data, remedy=remedy)
    return manifest


@dataclass(frozen=True)
class Published:
    """The published checkpoint of a run, and the recipe that it was trained by."""

    run: str
    checkpoint: str
    recipe: Recipe


def load_published(store: Store, name: str) -> Published:
    """Raises RunError("run-missing", "no-checkpoint" or "checkpoint-corrupt")."""
    run = load_run(store, name)
    checkpoints = Checkpoints(store, keys.run_root(name))
    checkpoint = checkpoints.require_best().checkpoint
    state = checkpoints.state(checkpoint)
    recipe = stored_recipe(state.recipe)
    if not state.data:  # format 1: the recipe may contradict the data set, which is right
        prepared = prepared_as(store, run.data, state.manifest_sha256)
        recipe = recipe.model_copy(update={"data": prepared or recipe.data})
    return Published(name, checkpoint, recipe)


def list_runs(store: Store) -> list[tuple[Run, Best | None]]:
    """Every run and its best pointer, oldest first."""
    names = [name for name in store.folders(keys.RUNS) if run_exists(store, name)]
    runs = [(load_run(store, name), Checkpoints(store, keys.run_root(name)).best()) for name in names]
    return sorted(runs, key=lambda pair: pair[0].created)


def pull_best(store: Store, name: str, out: Path) -> Best:
    """Copy the best checkpoint of a run into a folder: model.keras (HU in, probability out), weights,
    state, best.json, run.json, and post.json where `fit-post` chose settings for it. Every byte is verified
    before the folder gets any; returns best.json.

    Raises RunError("run-missing", "no-checkpoint", "checkpoint-corrupt"), DataError("output-unwritable").
    """
    run = load_run(store, name)
    checkpoints = Checkpoints(store, keys.run_root(name))
    pointer = checkpoints.require_best()
    committed = checkpoints.files(pointer.checkpoint, (WEIGHTS, STATE))
    model = store.get(keys.best_model(keys.run_root(name)))
    if hashlib.sha256(model).hexdigest() != pointer.model_sha256:
        remedy = "a training run may be writing it: pull again; else --resume, which writes the next best"
        raise RunError("checkpoint-corrupt", run=name, file="best/model.keras", remedy=remedy)
    files = {
        "model.keras": model,
        **committed,
        "run.json": to_json(asdict(run)),
        "best.json": to_json(asdict(pointer)),
    }
    post = keys.post(keys.run_root(name), pointer.checkpoint)
    chosen = {"post.json": store.get(post)} if store.exists(post) else {}
    target = FolderStore(out.absolute())
    try:
        for file, data in {**files, **chosen}.items():
            target.put(file, data)
        if not chosen:
            target.delete(["post.json"])  # another checkpoint's
    except StorageError as error:
        raise DataError("output-unwritable", folder=out, remedy="choose another --out") from error
    return pointer


def _versions() -> dict[str, str]:
    packages = ("lungseg", "tensorflow", "keras", "ray", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
