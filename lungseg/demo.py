"""The whole way on synthetic scans: every stage is the one a verb runs, on data small enough for a laptop."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lungseg.cluster import warm_up
from lungseg.config import Recipe, parse_recipe
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.prepare import prepare
from lungseg.errors import LungsegError, RunError
from lungseg.runs.best import Best
from lungseg.runs.run import load_published
from lungseg.sources import lidc
from lungseg.sources.phantom.write import write_phantom
from lungseg.storage import Store, keys, open_store, to_json
from lungseg.telemetry import progress, quiet_tensorflow, talks
from lungseg.train.launch import train
from lungseg.train.worker import IMPORTS

NAME = "demo"
LEGEND = """\
Dice: how far a mask and the true one are the same, 0 (nowhere) to 1 (everywhere); the mean over scans, over
boxes around nodules, or over nodules, where only what touches a nodule counts. HU threshold: whatever is
dense in the lungs, without a network. It finds each nodule, since those of phantoms are dense; but vessels
and walls are dense too, which the whole scan shows."""
SCANS, SEED = 12, 0


def demo_recipe() -> Recipe:
    """Small enough for two cores: half the default width, patches half as wide, few steps."""
    return parse_recipe(
        {
            "data": {
                "patch": {
                    "shape_zyx": [32, 32, 32],
                    "positives_per_nodule": 16,
                    "hard_negatives_per_scan": 48,
                },
                # A seed that gives two of the twelve patients to each.
                "split": {"val": 0.17, "test": 0.17, "seed": 49845},
                "shard": {"target_mib": 16},
            },
            "model": {"width": 8, "depth": 4},
            # On two cores two replicas take three tenths less time than one on both.
            "train": {
                "epochs": 4,
                "steps_per_epoch": 122,
                "global_batch": 4,
                "logical_cpu_devices": 2,
                "patience_epochs": 4,
                "publish": "last",  # two patients' patches tell less than that the learning rate has fallen
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 20},
            # After minutes of training most places that it marks are no nodules: their mean is low.
            "segment": {"window_zyx": [96, 96, 96], "candidate_score": "mean", "min_score": 0.5},
        }
    )


def run_demo(out: Path, store_uri: str) -> None:
    """Write everything below `out` (and the store, if another) and print the table; what is there already
    is reused."""
    store = open_store(store_uri)
    seconds: dict[str, float] = {}
    recipe = demo_recipe()
    _say("lungseg demo: synthetic chest CT (no patients) around real LIDC contours")
    warm_up(*IMPORTS)  # while the first scans are looked for, which leaves a core free
    with _stage("phantom", seconds), progress("synthetic scans") as report:
        write_phantom(out / "dicom", SCANS, SEED, report)
    with _stage("prepare", seconds), progress("scans prepared") as report:
        cases, _ = lidc.find_cases(out / "dicom", recipe.data.lidc)
        manifest = prepare(store, NAME, cases, recipe.data, report)
    with _stage("train", seconds):
        best = _train(store, recipe)
    scores = _score(store, manifest, out, best.checkpoint, seconds)
    _print_table(store, out, best, scores, seconds)


def _train(store: Store, recipe: Recipe) -> Best:
    try:
        return train(store, NAME, NAME, recipe, "resume")
    except RunError as error:
        if error.code != "stopped":
            raise
        remedy = "the same command goes on from there"  # the demo always resumes
        raise RunError("stopped", message=error.message, remedy=remedy) from error


def _score(
    store: Store, manifest: Manifest, out: Path, checkpoint: str, seconds: dict[str, float]
) -> dict[str, Any]:
    """Evaluate and predict, or what an earlier demo measured of the same checkpoint."""
    kept = out / "demo.json"
    if kept.exists():
        scores: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if scores["checkpoint"] == checkpoint and Path(scores["mask"]).exists():
            return scores
    with _stage("evaluate", seconds):
        with quiet_tensorflow():
            from lungseg.evaluate.protocol import evaluate_split
            from lungseg.evaluate.scans import Member
            from lungseg.runs.export import load_network

            published = load_published(store, NAME)
            best = load_network(store, published)
        with progress("test scans evaluated") as report:
            folder = out / "evaluation"
            members = [Member(published, manifest, best.predict)]
            result = evaluate_split(store, members, "test", folder, report, _refuse, baseline=True)
    with _stage("predict", seconds), progress("windows") as report:
        from lungseg.scan.dicom import read_series
        from lungseg.scan.identity import scan_id
        from lungseg.segment import predict
        from lungseg.segment.outputs import nifti

        cases, _ = lidc.find_cases(out / "dicom", best.recipe.data.lidc)
        case, folder = next((c.case_id, c.folder) for c in cases if c.case_id in manifest.cases["test"])
        volume = read_series(folder)
        found = predict.segment(best.predict, volume, best.recipe, report)
        scan = scan_id(volume, b"no patient's, so no secret")
        nifti.write(found, out / "prediction" / case, scan=scan, run=NAME, checkpoint=checkpoint)
    scores = {
        "checkpoint": checkpoint,
        "model": result.model,
        "baseline": result.baseline,
        "report": str(result.text),
        "mask": str(out / "prediction" / case / "mask.nii.gz"),
    }
    kept.write_bytes(to_json(scores))
    return scores


def _refuse(case_id: str, error: LungsegError) -> None:
    raise error


def _say(text: str) -> None:
    if talks():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    _say(f"== {name}")
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def _print_table(
    store: Store, out: Path, best: Best, scores: dict[str, Any], seconds: dict[str, float]
) -> None:
    print("\nDice on held-out synthetic scans   model   HU threshold")
    titles = {"dice": "whole scan", "crop_dice": "64 mm around a nodule", "per_nodule_dice": "per nodule"}
    for key, title in titles.items():
        print(f"  {title:<31} {_show(scores['model'][key])}   {_show(scores['baseline'][key])}")
    print(f"  validation Dice on patches      {_show(best.val_dice)}   (epoch {best.epoch})")
    print(LEGEND)
    print("\nseconds: " + ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items()), end="")
    print(f"; together {sum(seconds.values()):.0f}")
    print(f"best checkpoint: {store.uri}/{keys.checkpoint(keys.run_root(NAME), scores['checkpoint'])}")
    print(f"model:           {store.uri}/{keys.best_model(keys.run_root(NAME))}")
    print(f"mask:            {scores['mask']}")
    print(f"report:          {scores['report']}")


def _show(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"
