"""The report of a split: text for people, JSON for scripts, a page with charts, and tables."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lungseg.errors import DataError
from lungseg.show import table

SCHEMA_VERSION = 3
"""Of the JSON: 1 had no version, no nodules and no intervals; 2 no members, and `longest_axial_diameter_mm`
for the nodules' `mask_axial_diameter_mm`."""

HEADLINES = {
    "dice": "Dice (full scan, per case)",
    "dice_without_empty_scans": "Dice (full scan, empty against empty left out)",
    "working_grid_dice": "Dice (full scan, on the network's grid)",
    "soft_dice": "soft Dice (of probabilities, working grid)",
    "cross_entropy": "cross-entropy (nats a voxel, working grid)",
    "per_nodule_dice": "per-nodule Dice (all components that touch, misses as 0)",
    "dice_misses_as_0": "per-nodule Dice (one to one, misses as 0)",
    "dice_errors_as_0": "per-nodule Dice (false positives as 0 too)",
    "crop_dice": "nodule-crop Dice (64 mm cube)",
    "sensitivity": "nodules touched by a component (share)",
    "false_positives_per_scan": "false positives a scan",
    "f1": "F1 = RQ (one to one, IoU > 0.1)",
    "sq": "SQ (mean IoU of pairs)",
    "pq": "PQ = F1 x SQ",
    "f1_at_iou_half": "F1 = RQ (one to one, IoU > 0.5)",
    "pq_at_iou_half": "PQ (IoU > 0.5)",
    "surface_dice_1mm": "surface Dice at 1 mm (misses as 0)",
    "surface_dice_2mm": "surface Dice at 2 mm (misses as 0)",
    "hd95_mm": "HD95, mm (found nodules)",
    "mean_surface_mm": "mean surface distance, mm (found nodules)",
    "volume_error_mm3": "volume error, mm3 (found nodules)",
    "volume_error_share": "volume error (share of the truth)",
    "absolute_volume_error_share": "volume error without its sign",
    "diameter_error_mm": "error of the masks' longest axial diameter, mm",
    "reader_with_reader": "Dice of a reader with another",
    "model_with_reader": "Dice of the model with a reader",
    "reader_with_others": "Dice of a reader with the others' consensus",
    "model_with_others": "Dice of the model in the same place",
    "model_minus_reader": "model minus reader there",
}
SEED_FIGURES = {
    "loss": "loss (1 - soft Dice)",
    "accuracy": "accuracy (full scan)",
    "mean_iou": "mean IoU (nodule and background, thresholded)",
    "dice": "Dice (full scan, per case)",
}
SEED_NOTE = (
    "The seed project took MeanIoU of raw sigmoids, which thresholds nothing. Here all four are means over\n"
    "whole scans: mean IoU, accuracy and Dice of the final mask, the loss of the probabilities."
)
_COLUMNS = ("dice", "per_nodule_dice", "crop_dice", "nodules", "detected", "false_positives")


def as_text(tree: Mapping[str, Any]) -> str:
    intervals = tree["intervals"]
    parts = [
        f"Evaluation of run {tree['run']} on split {tree['split']}: {len(tree['cases'])} scans, "
        f"{tree['patients']} patients, {tree['summary']['nodules']} nodules",
        f"{tree['software']}, {tree['created_utc']}, checkpoint {tree['checkpoint']}",
        *("\n".join(textwrap.wrap(note, 100)) for note in notes(tree)),
        *(f"left out, could not be used: {one['case_id']} ({one['code']})" for one in tree["left_out"]),
        "",
        f"Masks on the scan's own grid; in brackets {intervals['level']:.0%} intervals over patients.",
        *(["Of so few patients the intervals mean little."] if intervals["means_little"] else []),
        _figures(intervals["figures"], HEADLINES),
        _empty(tree["empty_against_empty"]),
        "",
        "Detection: sensitivity at false positives a scan",
        _detection(tree["detection"]),
        "",
        *_calibration(tree["calibration"]),
        *_strata(tree["strata"]),
        _figures(intervals["figures"], SEED_FIGURES),
        SEED_NOTE,
        "",
        *(f"{key}: {json.dumps(value)}" for key, value in tree["extra"].items()),
        _cases(tree["cases"]),
    ]
    return "\n".join(parts) + "\n"


def notes(tree: Mapping[str, Any]) -> list[str]:
    """Whose mean it is, and where settings come from."""
    found = [_of_members(tree)] if len(tree["members"]) > 1 else []
    if tree["post"]:
        flatters = ", which they therefore flatter" if tree["split"] == "val" else ""
        found.append(f"{tree['post']['says']}{flatters}.")
    return found


def _of_members(tree: Mapping[str, Any]) -> str:
    names = ", ".join(f"{one['run']} (checkpoint {one['checkpoint']})" for one in tree["members"])
    least, most = tree["networks_a_scan"]
    asked = str(most) if least == most else f"{least} to {most}"
    few = "" if least == len(tree["members"]) else f"; a scan is scored by the {asked} that never saw it"
    return f"The mean of {len(tree['members'])} networks: {names}{few}."


def _figures(found: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    return "\n".join(f"{title:<58}{_between(found[name])}" for name, title in titles.items() if name in found)


def _empty(empty: Mapping[str, Any]) -> str:
    return (
        f"Scans with neither nodule nor prediction: {empty['scans']}. Their Dice is 1 in the first line; in\n"
        "the second it is NaN, as in nnU-Net, and left out."
    )


def _detection(detection: Mapping[str, Any]) -> str:
    titles = {"luna16": "LUNA16 (within the radius)", "overlap": "nnDetection (IoU > 0.1)"}
    luna16 = detection["luna16"]
    rows = []
    for rule, title in titles.items():
        sensitivity, cpm = detection[rule]["sensitivity"].values(), detection[rule]["cpm"]
        rows.append([title, *map(show, sensitivity), _between(cpm)])
        between = detection[rule]["sensitivity_bounds"].values()
        rows.append(
            ["  between", *("-" if low is None else f"{low:.2f}-{high:.2f}" for low, high in between), ""]
        )
    by_score = ", ".join(f"{kind} {show(value)}" for kind, value in detection["cpm_by_score"].items())
    lines = [
        table(["rule", *luna16["sensitivity"], "CPM"], rows),
        f"Candidates are ranked by segment.candidate_score={detection['score']}. CPM by each: {by_score}; "
        "fit-post chooses on val.",
        f"One false positive a scan: candidates from {show(luna16['threshold_at_1_false_positive'])}.",
    ]
    return "\n".join(lines)


def _calibration(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    return [f"Calibration of candidates: ECE {show(found['ece'])}, Brier {show(found['brier'])}", ""]


def _strata(strata: Mapping[str, Mapping[str, Any]]) -> list[str]:
    columns = {
        "sensitivity": "touched",
        "cpm": "CPM",
        "dice_misses_as_0": "Dice, misses as 0",
        "surface_dice_1mm": "surface Dice 1 mm",
        "absolute_volume_error_share": "volume error",
        "reader_with_others": "reader with others",
        "model_with_others": "model there",
    }
    rows = [
        [title, str(one["nodules"]), *(_between(one.get(name)) for name in columns)]
        for members in strata.values()
        for title, one in members.items()
        if one["nodules"]
    ]
    return [table(["nodules", "count", *columns.values()], rows), ""] if rows else []


def _cases(cases: list[dict[str, Any]]) -> str:
    rows = [[one["case_id"], *(show(one[column]) for column in _COLUMNS)] for one in cases]
    return table(["case", *_COLUMNS], rows)


def _between(found: Mapping[str, Any] | float | None) -> str:
    """A value, with its interval where it has one."""
    if not isinstance(found, Mapping) or found["value"] is None:
        return show(None if isinstance(found, Mapping) else found)
    return f"{show(found['value'])} [{show(found['low'])}, {show(found['high'])}]"


def show(value: float | int | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def to_strict_json(tree: Any) -> str:
    """NaN and infinity become null."""
    return json.dumps(_finite(tree), indent=2, allow_nan=False) + "\n"


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """All into the folder `out`, each at once. Raises DataError("output-unwritable")."""
    try:
        for name, data in files.items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{os.getpid()}-{path.name}")
            temporary.write_bytes(data)
            os.replace(temporary, path)
    except OSError as error:
        raise DataError("output-unwritable", folder=out, remedy=f"choose another --out ({error})") from error


def _finite(value: Any) -> Any:
    """A copy that strict JSON can hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
