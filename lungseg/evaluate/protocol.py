"""Evaluate a run on the whole held-out scans of its data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.dataset.case import IGNORE
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.stored_scans import read_scan
from lungseg.errors import DataError
from lungseg.evaluate.case import CaseResult, evaluate_case, mean_or_none
from lungseg.evaluate.report import reader_ceiling, write_report
from lungseg.runs.export import BestModel
from lungseg.scan.lungs import lung_mask
from lungseg.segment.sliding import predict_volume
from lungseg.storage import Store
from lungseg.telemetry import Progress

BASELINE_HU = -400


@dataclass(frozen=True)
class Evaluation:
    """Summaries of the model and of the HU-threshold baseline on the same scans, and the model's report."""

    model: dict[str, Any]
    baseline: dict[str, Any]
    text: Path
    json: Path


def evaluate_split(
    store: Store, manifest: Manifest, best: BestModel, split: str, out: Path, progress: Progress
) -> Evaluation:
    """Score `best` on every stored volume of `split` and write the report to `out`.

    Raises DataError("split-empty") if the data set keeps no whole scans of that split.
    """
    entries = manifest.require_held_out(split)
    config = best.recipe.segment
    methods: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "model": lambda hu, lungs: predict_volume(
            best.predict, hu, config, lungs=lungs, multiple=best.recipe.model.total_stride
        ),
        "baseline": threshold_baseline,
    }
    results: dict[str, list[CaseResult]] = {name: [] for name in methods}
    for number, entry in enumerate(entries):
        stored = read_scan(store, entry)
        mask, lungs = stored.mask, lung_mask(stored.volume)
        found = lungs if lungs.any() else None
        for name, probability_of in methods.items():
            everywhere = np.ones_like(mask) if found is None else found
            results[name].append(
                evaluate_case(
                    probability_of(stored.volume.volume_hu, everywhere),
                    mask == 1,
                    mask == IGNORE,
                    stored.volume.geometry.spacing_mm,
                    config,
                    lungs=found,
                    case_id=entry.case_id,
                )
            )
        progress(number + 1, len(entries))
    summaries = {name: summarise(cases) for name, cases in results.items()}
    extra = {
        "data": manifest.name,
        "manifest_sha256": manifest.sha256,
        "checkpoint": best.checkpoint,
        "threshold_baseline": summaries["baseline"],
    }
    ceiling = reader_ceiling(nodule for facts in manifest.scans.values() for nodule in facts.nodules)
    text, json = write_report(results["model"], summaries["model"], out, best.run, split, ceiling, extra)
    return Evaluation(summaries["model"], summaries["baseline"], text, json)


def summarise(results: Sequence[CaseResult]) -> dict[str, float | int | None]:
    """Means over scans; numbers of nodules (their Dice, sensitivity) over all nodules of the split.

    Raises DataError("split-empty").
    """
    if not results:
        raise DataError(
            "split-empty", remedy="choose a split with scans, or prepare the data with larger shares"
        )
    nodules = sum(result.nodules for result in results)
    false_positives = sum(result.false_positives for result in results)
    detected = sum(result.detected for result in results)

    def over_nodules(value: Callable[[CaseResult], float | None]) -> float | None:
        return sum((value(r) or 0.0) * r.nodules for r in results) / nodules if nodules else None

    return {
        "cases": len(results),
        "loss": mean_or_none([r.loss for r in results]),
        "accuracy": mean_or_none([r.accuracy for r in results]),
        "mean_iou": mean_or_none([r.mean_iou for r in results]),
        "dice": mean_or_none([r.dice for r in results]),
        "soft_dice": mean_or_none([r.soft_dice for r in results]),
        "cross_entropy": mean_or_none([r.cross_entropy for r in results]),
        "per_nodule_dice": over_nodules(lambda r: r.per_nodule_dice),
        "crop_dice": over_nodules(lambda r: r.crop_dice),
        "nodules": nodules,
        "detected": detected,
        "sensitivity": detected / nodules if nodules else None,
        "false_positives": false_positives,
        "false_positives_per_scan": false_positives / len(results),
    }


def threshold_baseline(volume_hu: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """float32 [z, y, x], 1 where a voxel of the lungs is denser than -400 HU: what needs no training.

    It is scored by `evaluate_case` as any model's probability is.
    """
    return ((volume_hu > BASELINE_HU) & (lungs != 0)).astype(np.float32)
