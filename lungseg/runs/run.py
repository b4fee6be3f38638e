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
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.errors import ConfigError, DataError, RunError, StorageError
from lungseg.runs.checkpoint import STATE, WEIGHTS, Checkpoints
from lungseg.storage import FolderStore, Store, to_json
from lungseg.stream.order import steps_per_pass

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
        network, train = recipe.model.model_dump(mode="json"), self.recipe["train"]
        return (kind, manifest.sha256, network, recipe.train.global_batch, recipe.train.seed) == (
            self.kind, self.manifest_sha256, self.recipe["model"], train["global_batch"], train["seed"],
        )  # fmt: skip


def run_root(name: str) -> str:
    return f"runs/{name}"


def open_run(
    store: Store, name: str, manifest: Manifest, recipe: Recipe, mode: Mode, kind: Kind = "train"
) -> Run:
    """Claim a name ("fresh"), continue it ("resume", which starts it if need be) or begin it anew ("new",
    which keeps older checkpoints and the best over all attempts).

    Raises what `check_fit` and `initial_checkpoint` raise; RunError("run-exists") for "fresh" on a taken
    name; RunError("run-differs") for "resume" where the run does not fit (see Run.fits).
    """
    check_fit(manifest, recipe, kind)
    key = f"{run_root(name)}/run.json"
    going_on = mode == "resume" and run_exists(store, name)
    now = datetime.now(UTC)
    run = Run(
        name=name,
        attempt=f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}",
        data=manifest.name,
        manifest_sha256=manifest.sha256,
        recipe=recipe.model_dump(mode="json"),
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
            was = old.recipe["train"]
            raise RunError(
                "run-differs",
                run=name,
                message="other data, network, verb, train.global_batch or train.seed",
                remedy=f"give the same --data, network, train.global_batch={was['global_batch']} and "
                f"train.seed={was['seed']} as before, or begin anew with --new",
            )
        kept = {"attempt": old.attempt, "created": old.created, "init": old.init}
        run = Run(**{**asdict(run), **kept})
    store.put(key, to_json(asdict(run)))
    return run


def check_fit(manifest: Manifest, recipe: Recipe, kind: Kind) -> None:
    """Raises DataError("too-few-patches", "no-nodules", "no-validation") or ConfigError("patch-shape") where
    a data set and a recipe cannot train together."""
    steps_per_pass(manifest.rows("train"), recipe.train.global_batch)
    if not any(manifest.positives("train")):
        remedy = "prepare scans whose masks hold nodules (see data.pairs.label), or another split"
        raise DataError("no-nodules", data=manifest.name, split="train", remedy=remedy)
    # Without a nodule silence scores 1: the first epoch that finds nothing would be the best for ever.
    if not any(manifest.positives("val")) and (kind == "tune" or recipe.train.publish == "best"):
        found = "no nodule among its patches" if manifest.rows("val") else "no patches"
        remedy = "prepare data of more patients, with data.split.val above 0 or another data.split.seed"
        remedy += "" if kind == "tune" else ", or publish the last epoch with train.publish=last"
        raise DataError("no-validation", data=manifest.name, split="val", message=found, remedy=remedy)
    patch, stride = manifest.patch_shape_zyx, recipe.model.total_stride
    sides = recipe.augment.crop_zyx or patch
    if any(side % stride for side in (*sides, *patch)):
        message, remedy = f"no multiple of {stride} voxels", "lower model.depth, or prepare other patches"
    elif any(side > whole for side, whole in zip(sides, patch, strict=True)):
        message, remedy = f"patches have {patch}", "lower augment.crop_zyx"
    elif any(side < 3 * stride for side in (sides[0], patch[0])):
        # oneDNN 3.7 gives wrong gradients of bfloat16 convolutions over two slices, some of them NaN; and
        # one slice has no depth to convolve over.
        message, remedy = "fewer than 3 slices at the deepest level", "lower model.depth"
    elif recipe.augment.turns and sides[1] != sides[2]:
        message, remedy = "turns need square slices", "set augment.turns=false"
    else:
        return
    raise ConfigError("patch-shape", patch_shape_zyx=sides, message=message, remedy=remedy)


def initial_checkpoint(store: Store, recipe: Recipe) -> str:
    """The checkpoint ("run/checkpoint") that `train.init_from` names, or "".

    Raises RunError("run-missing", "no-checkpoint", "init-differs").
    """
    source = recipe.train.init_from
    if not source:
        return ""
    load_run(store, source)
    best = Checkpoints(store, run_root(source)).read_best()
    if best.state.recipe["model"] != recipe.model.model_dump(mode="json"):
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
    return store.exists(f"{run_root(name)}/run.json")


def _taken(store: Store, name: str) -> RunError:
    remedy = "continue it with --resume, begin it anew with --new, or choose another --run name"
    return RunError("run-exists", run=name, store=store.uri, remedy=remedy)


def load_run(store: Store, name: str) -> Run:
    """Raises RunError("run-missing") with the names that exist."""
    if not run_exists(store, name):
        known = ", ".join(store.folders("runs/")) or "none"
        raise RunError("run-missing", run=name, store=store.uri, remedy=f"choose one of: {known}")
    return Run(**store.get_json(f"{run_root(name)}/run.json"))


def load_run_data(store: Store, name: str) -> Manifest:
    """The data set that a run was trained on.

    Raises RunError("run-missing"), DataError("data-missing"), RunError("data-changed").
    """
    run = load_run(store, name)
    manifest = load_manifest(store, run.data)
    if manifest.sha256 != run.manifest_sha256:
        remedy = "the held-out scans may be others now: train again on this data set"
        raise RunError("data-changed", run=name, data=run.data, remedy=remedy)
    return manifest


def list_runs(store: Store) -> list[tuple[Run, dict[str, Any] | None]]:
    """Every run and its best pointer, oldest first."""
    names = [name for name in store.folders("runs/") if run_exists(store, name)]
    runs = [(load_run(store, name), Checkpoints(store, run_root(name)).best()) for name in names]
    return sorted(runs, key=lambda pair: pair[0].created)


def pull_best(store: Store, name: str, out: Path) -> dict[str, Any]:
    """Copy the best checkpoint of a run into a folder: model.keras (HU in, probability out), weights,
    state, best.json and run.json. Every byte is verified before the folder gets any; returns best.json.

    Raises RunError("run-missing", "no-checkpoint", "checkpoint-corrupt"), DataError("output-unwritable").
    """
    run = load_run(store, name)
    checkpoints = Checkpoints(store, run_root(name))
    pointer = checkpoints.require_best()
    committed = checkpoints.files(pointer["checkpoint"], (WEIGHTS, STATE))
    model = store.get(f"{run_root(name)}/best/model.keras")
    if hashlib.sha256(model).hexdigest() != pointer["model_sha256"]:
        remedy = "a training run may be writing it: pull again; else --resume, which writes the next best"
        raise RunError("checkpoint-corrupt", run=name, file="best/model.keras", remedy=remedy)
    files = {
        "model.keras": model,
        **committed,
        "run.json": to_json(asdict(run)),
        "best.json": to_json(pointer),
    }
    target = FolderStore(out.absolute())
    try:
        for file, data in files.items():
            target.put(file, data)
    except StorageError as error:
        raise DataError("output-unwritable", folder=out, remedy="choose another --out") from error
    return pointer


def _versions() -> dict[str, str]:
    packages = ("lungseg", "tensorflow", "keras", "ray", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
