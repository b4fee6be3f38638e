"""The numbers of one scan, of a split, and their report; each is named for what it is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from scipy import ndimage

from lungseg import __version__
from lungseg.config import SegmentConfig
from lungseg.errors import DataError
from lungseg.evaluate import metrics
from lungseg.segment.postprocess import components

BASELINE_HU = -400
CROP_MM = 64.0
READER_CEILING = {"reader_to_reader_dice": 0.75, "reader_to_consensus_dice": 0.86}


@dataclass(frozen=True)
class CaseResult:
    """One scan. None where a number has no meaning: nodule numbers of a scan without nodules.

    `dice`, `mean_iou` and `accuracy` compare the whole scan's final mask (thresholded, small components
    gone); `soft_dice`, `loss` (1 - soft_dice) and `cross_entropy` compare the probabilities.
    `per_nodule_dice` is the mean over nodules of the Dice with the components that touch each, misses as 0.
    `crop_dice` is the mean over nodules of the Dice in a cube of 64 mm around each.
    `false_positives` are components that touch neither nodule nor ignore region.
    """

    case_id: str
    loss: float
    accuracy: float
    mean_iou: float
    dice: float
    soft_dice: float
    cross_entropy: float
    nodules: int
    detected: int
    per_nodule_dice: float | None
    crop_dice: float | None
    components: int
    false_positives: int


def evaluate_case(
    probability: np.ndarray,
    mask: np.ndarray,
    ignore: np.ndarray,
    spacing_mm: tuple[float, float, float],
    config: SegmentConfig,
    *,
    lungs: np.ndarray | None = None,
    case_id: str = "",
) -> CaseResult:
    """Score one scan. All arrays are [z, y, x] on one grid of `spacing_mm` (z, y, x).

    The probability becomes a mask as `lungseg predict` makes it, with the same `lungs`. A nodule of the
    reference is a 26-connected component of `mask` outside `ignore`, detected if a component touches it.
    Raises GeometryError("shape-mismatch").
    """
    labels = components(probability, config, spacing_mm, lungs)
    predicted = labels > 0
    soft_dice = metrics.soft_dice(mask, probability, ignore)
    nodule_labels = cc3d.connected_components((mask != 0) & (ignore == 0), connectivity=26).astype(np.int32)
    nodule_dices = metrics.per_nodule_dice(nodule_labels, labels, ignore)
    true_or_ignored = np.unique(labels[(mask != 0) | (ignore != 0)])
    found = int(labels.max(initial=0))
    return CaseResult(
        case_id=case_id,
        loss=1 - soft_dice,
        accuracy=metrics.accuracy(mask, predicted, ignore),
        mean_iou=metrics.mean_iou(mask, predicted, ignore),
        dice=metrics.dice(mask, predicted, ignore),
        soft_dice=soft_dice,
        cross_entropy=metrics.binary_cross_entropy(mask, probability, ignore),
        nodules=len(nodule_dices),
        detected=sum(score > 0 for score in nodule_dices),
        per_nodule_dice=_mean(nodule_dices),
        crop_dice=_mean(_crop_dices(nodule_labels, predicted, mask, ignore, spacing_mm)),
        components=found,
        false_positives=found - int(np.count_nonzero(true_or_ignored)),
    )


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
        "loss": _mean([r.loss for r in results]),
        "accuracy": _mean([r.accuracy for r in results]),
        "mean_iou": _mean([r.mean_iou for r in results]),
        "dice": _mean([r.dice for r in results]),
        "soft_dice": _mean([r.soft_dice for r in results]),
        "cross_entropy": _mean([r.cross_entropy for r in results]),
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


def write_report(
    results: Sequence[CaseResult],
    summary: dict[str, float | int | None],
    out: Path,
    run: str,
    split: str,
    extra: dict[str, Any],
) -> tuple[Path, Path]:
    """Write evaluation-<UTC stamp>.txt, for people, and the same as .json into `out`; their two paths.

    `extra` holds further facts by name (the baseline's summary, the checkpoint). NaN and infinity become
    null. Raises DataError("output-unwritable").
    """
    created = datetime.now(UTC)
    report = {
        "software": f"lungseg {__version__}",
        "created_utc": created.isoformat(timespec="seconds"),
        "run": run,
        "split": split,
        "summary": summary,
        "reader_ceiling": READER_CEILING,
        "extra": extra,
        "cases": [asdict(result) for result in results],
    }
    stem = f"evaluation-{created:%Y%m%dT%H%M%SZ}"
    text = out / f"{stem}.txt", _as_text(results, summary, report)
    machine = out / f"{stem}.json", json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in (text, machine):
            temporary = path.with_name(f".{os.getpid()}-{path.name}")
            temporary.write_text(content, encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise DataError("output-unwritable", folder=out, remedy=f"choose another --out ({error})") from error
    return text[0], machine[0]


_HEADLINES = {
    "loss": "loss (1 - soft Dice)",
    "accuracy": "accuracy (full scan)",
    "mean_iou": "mean IoU (nodule and background, thresholded)",
    "dice": "Dice (full scan, per case)",
    "soft_dice": "soft Dice (full scan, of probabilities)",
    "cross_entropy": "cross-entropy (nats a voxel)",
    "per_nodule_dice": "per-nodule Dice (misses as 0)",
    "crop_dice": "nodule-crop Dice (64 mm cube)",
    "sensitivity": "nodules detected (share)",
    "false_positives_per_scan": "false positives a scan",
}
_COLUMNS = (
    "loss",
    "accuracy",
    "mean_iou",
    "dice",
    "per_nodule_dice",
    "crop_dice",
    "nodules",
    "detected",
    "false_positives",
)


def _as_text(
    results: Sequence[CaseResult], summary: dict[str, float | int | None], report: dict[str, Any]
) -> str:
    lines = [
        f"Evaluation of run {report['run']} on split {report['split']}: {len(results)} scans",
        f"{report['software']}, {report['created_utc']}",
        "",
        *(f"{title:<48}{_show(summary[key])}" for key, title in _HEADLINES.items()),
        "",
        "Ceiling on LIDC-IDRI, Dice per nodule: one reader with another about "
        f"{READER_CEILING['reader_to_reader_dice']}, with the consensus about "
        f"{READER_CEILING['reader_to_consensus_dice']}.",
        *(f"{key}: {json.dumps(_finite(value))}" for key, value in report["extra"].items()),
        "",
    ]
    rows = [["case", *_COLUMNS]]
    rows += [[result.case_id, *(_show(getattr(result, column)) for column in _COLUMNS)] for result in results]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for case_id, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([case_id.ljust(widths[0]), *cells]))
    return "\n".join(lines) + "\n"


def _show(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """A copy that strict JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _crop_dices(
    nodule_labels: np.ndarray,
    predicted: np.ndarray,
    mask: np.ndarray,
    ignore: np.ndarray,
    spacing_mm: tuple[float, float, float],
) -> list[float]:
    """Dice in a cube of CROP_MM about the middle of each nodule's box, clipped at the scan's border."""
    scores = []
    for box in ndimage.find_objects(nodule_labels):
        middles = [(side.start + side.stop) / 2 for side in box]
        halves = [CROP_MM / 2 / spacing for spacing in spacing_mm]
        cube = tuple(
            slice(max(0, round(middle - half)), round(middle + half))
            for middle, half in zip(middles, halves, strict=True)
        )
        scores.append(metrics.dice(mask[cube], predicted[cube], ignore[cube]))
    return scores


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
