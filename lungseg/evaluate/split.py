"""Evaluate a run on the whole held-out scans of its data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lungseg.data.lungs import lung_mask
from lungseg.data.shards import Manifest
from lungseg.data.volumes import read_volume
from lungseg.evaluate.protocol import CaseResult, evaluate_case, summarise, threshold_baseline, write_report
from lungseg.segment.sliding import predict_volume
from lungseg.storage import Store
from lungseg.telemetry import Progress
from lungseg.train.export import BestModel


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
    entries = manifest.held_out(split)
    config = best.recipe.segment
    methods: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "model": lambda hu, lungs: predict_volume(
            best.predict, hu, config, lungs=lungs, multiple=best.recipe.model.total_stride
        ),
        "baseline": threshold_baseline,
    }
    results: dict[str, list[CaseResult]] = {name: [] for name in methods}
    for number, entry in enumerate(entries):
        stored = read_volume(store, entry)
        lungs = lung_mask(stored.volume)
        found = lungs if lungs.any() else None
        for name, probability_of in methods.items():
            everywhere = np.ones_like(stored.mask) if found is None else found
            results[name].append(
                evaluate_case(
                    probability_of(stored.volume.volume_hu, everywhere),
                    stored.mask == 1,
                    stored.mask == 255,
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
    text, json = write_report(results["model"], summaries["model"], out, best.run, split, extra)
    return Evaluation(summaries["model"], summaries["baseline"], text, json)
