"""The forms of a report that other tools read: tables of nodules and candidates, nnU-Net's and LUNA16's."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lungseg.evaluate.case import CaseResult


def tables(results: Sequence[CaseResult], tree: Mapping[str, Any]) -> dict[str, bytes]:
    """By the name of the file; `tree` is that of the summary, which holds the nodules."""
    candidates = [
        {"case_id": case.case_id, "patient": case.patient, **mark.to_row()}
        for case in results
        for mark in case.detection.marks
    ]
    return {
        "nodules.csv": _csv(tree["nodules"]),
        "candidates.csv": _csv(candidates),
        "luna16.csv": _csv([_luna16(row) for row in candidates], LUNA16_COLUMNS),
        "summary.json": json.dumps(nnunet_summary(results), indent=4).encode(),
    }


LUNA16_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "probability")


def _luna16(row: Mapping[str, Any]) -> dict[str, Any]:
    """As its script reads it; the case id stands for the UID, which is never written."""
    place = (row[f"{axis}_lps_mm"] for axis in "xyz")
    return dict(zip(LUNA16_COLUMNS, (row["case_id"], *place, row["score"]), strict=True))


def nnunet_summary(results: Sequence[CaseResult]) -> dict[str, Any]:
    """nnU-Net 2's summary.json, label 1 being nodule, over the voxels that count. A Dice or IoU of two empty
    masks is NaN there and left out of means, and NaN stands in the file as Python writes it."""
    metrics = [_nnunet_metrics(case) for case in results]
    mean = {name: _nanmean([one[name] for one in metrics]) for name in metrics[0]}
    cases = [
        {"metrics": {"1": one}, "prediction_file": case.case_id, "reference_file": case.case_id}
        for case, one in zip(results, metrics, strict=True)
    ]
    return {"foreground_mean": mean, "mean": {"1": mean}, "metric_per_case": cases}


def _nanmean(values: Sequence[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return fmean(numbers) if numbers else math.nan


def _nnunet_metrics(case: CaseResult) -> dict[str, float]:
    both, truth, predicted = (case.voxels[name] for name in ("both", "truth", "predicted"))
    either = truth + predicted - both
    return {
        "Dice": 2 * both / (truth + predicted) if either else math.nan,
        "FN": truth - both,
        "FP": predicted - both,
        "IoU": both / either if either else math.nan,
        "TN": case.voxels["counted"] - either,
        "TP": both,
        "n_pred": predicted,
        "n_ref": truth,
    }


def _csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns or (list(rows[0]) if rows else ["case_id"]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()
