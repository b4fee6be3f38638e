"""The report of a split, as text for people and JSON for scripts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lungseg import __version__
from lungseg.dataset.case import Nodule
from lungseg.errors import DataError
from lungseg.evaluate.case import CaseResult

READER_CEILING = {"reader_to_reader_dice": 0.75, "reader_to_consensus_dice": 0.86}


def reader_ceiling(nodules: Iterable[Nodule]) -> dict[str, float] | None:
    """LIDC-IDRI's figures where the nodules were marked by readers as there; None for any other data."""
    return READER_CEILING if any(nodule.readers for nodule in nodules) else None


def write_report(
    results: Sequence[CaseResult],
    summary: dict[str, float | int | None],
    out: Path,
    run: str,
    split: str,
    ceiling: dict[str, float] | None,
    extra: dict[str, Any],
) -> tuple[Path, Path]:
    """Write evaluation-<UTC stamp>.txt, for people, and the same as .json into `out`; their two paths.

    `ceiling` is what `reader_ceiling` says of the data; `extra` holds further facts by name (the baseline's
    summary, the checkpoint). NaN and infinity become null. Raises DataError("output-unwritable").
    """
    created = datetime.now(UTC)
    report = {
        "software": f"lungseg {__version__}",
        "created_utc": created.isoformat(timespec="seconds"),
        "run": run,
        "split": split,
        "summary": summary,
        "reader_ceiling": ceiling,
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
        *_ceiling_as_text(report["reader_ceiling"]),
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


def _ceiling_as_text(ceiling: dict[str, float] | None) -> list[str]:
    if ceiling is None:
        return []
    reader, consensus = ceiling["reader_to_reader_dice"], ceiling["reader_to_consensus_dice"]
    return [
        f"Ceiling on LIDC-IDRI, Dice per nodule: one reader with another about {reader}, with the "
        f"consensus about {consensus}."
    ]


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
