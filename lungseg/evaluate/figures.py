"""Figures of a split as statistics of its scans: each has a value, and an interval over patients.

A figure over nodules is the mean over all nodules of the split that have it, a figure over scans the mean
over scans. `STRATA` says which nodules it is given for besides all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from lungseg.evaluate.bootstrap import Ratio, ratio
from lungseg.evaluate.case import CaseResult
from lungseg.evaluate.froc import Hits
from lungseg.evaluate.matching import Parts
from lungseg.evaluate.nodule import NoduleScore

Chosen = Callable[[NoduleScore], bool]

OF_SCANS = ("loss", "accuracy", "mean_iou", "dice", "working_grid_dice", "soft_dice", "cross_entropy")
OVER_SCANS: Mapping[str, Callable[[CaseResult], Parts]] = {
    **{
        name: lambda case, name=name: (getattr(case, name), 1.0)  # type: ignore[misc]
        for name in OF_SCANS
    },
    "dice_without_empty_scans": lambda case: (case.dice, 1.0) if not case.both_empty else (0.0, 0.0),
    "false_positives_per_scan": lambda case: (case.false_positives, 1.0),
    "f1": lambda case: case.matching.f1,
    "sq": lambda case: case.matching.sq,
    "pq": lambda case: case.matching.pq,
    "f1_at_iou_half": lambda case: case.matching_half.f1,
    "sq_at_iou_half": lambda case: case.matching_half.sq,
    "pq_at_iou_half": lambda case: case.matching_half.pq,
    "dice_errors_as_0": lambda case: case.matching_any.dice_errors_as_0,
}

OVER_NODULES: Mapping[str, Callable[[NoduleScore], float | None]] = {
    "sensitivity": lambda row: float(row.touching_dice > 0),
    "per_nodule_dice": lambda row: row.touching_dice,
    "crop_dice": lambda row: row.crop_dice,
    "dice_misses_as_0": lambda row: row.outline.dice,
    "surface_dice_1mm": lambda row: row.outline.surface_dice_1mm,
    "surface_dice_2mm": lambda row: row.outline.surface_dice_2mm,
    "hd95_mm": lambda row: row.outline.hd95_mm,
    "mean_surface_mm": lambda row: row.outline.mean_surface_mm,
    "volume_error_mm3": lambda row: row.outline.volume_error_mm3,
    "volume_error_share": lambda row: row.outline.volume_error_share,
    "absolute_volume_error_share": lambda row: _absolute(row.outline.volume_error_share),
    "diameter_error_mm": lambda row: row.outline.diameter_error_mm,
    "absolute_diameter_error_mm": lambda row: _absolute(row.outline.diameter_error_mm),
}

OF_READERS: Mapping[str, Callable[[NoduleScore], float | None]] = {
    **{
        name: lambda row, name=name: asdict(row.readers)[name] if row.readers else None  # type: ignore[misc]
        for name in ("reader_with_reader", "model_with_reader", "reader_with_others", "model_with_others")
    },
    "model_minus_reader": lambda row: (
        row.readers.model_with_others - row.readers.reader_with_others if row.readers else None
    ),
}

STRATA: Mapping[str, Mapping[str, Chosen]] = {
    "diameter": {
        "< 3 mm": lambda row: row.diameter_mm < 3,
        "3-6 mm": lambda row: 3 <= row.diameter_mm < 6,
        "6-8 mm": lambda row: 6 <= row.diameter_mm < 8,
        "8-15 mm": lambda row: 8 <= row.diameter_mm < 15,
        ">= 15 mm": lambda row: row.diameter_mm >= 15,
    },
    "texture": {
        "ground glass": lambda row: row.nodule.texture is not None and row.nodule.texture < 2,
        "part-solid": lambda row: row.nodule.texture is not None and 2 <= row.nodule.texture < 4,
        "solid": lambda row: row.nodule.texture is not None and row.nodule.texture >= 4,
    },
    "readers": {
        f"{count} readers": lambda row, count=count: row.nodule.readers == count  # type: ignore[misc]
        for count in (1, 2, 3, 4)
    },
    "place": {
        "at the pleura": lambda row: row.pleural is True,
        "within the lung": lambda row: row.pleural is False,
    },
}


def everything(row: NoduleScore) -> bool:
    return True


def over_scans(results: Sequence[CaseResult], name: str) -> Ratio:
    parts = [OVER_SCANS[name](case) for case in results]
    return ratio([part for part, _ in parts], [whole for _, whole in parts])


def over_nodules(
    results: Sequence[CaseResult], value: Callable[[NoduleScore], float | None], chosen: Chosen = everything
) -> Ratio:
    found = [[v for row in case.rows if chosen(row) and (v := value(row)) is not None] for case in results]
    return ratio([sum(values) for values in found], [len(values) for values in found])


def chosen_hits(results: Sequence[CaseResult], hits: Sequence[Hits], chosen: Chosen) -> list[Hits]:
    """Of a stratum."""
    return [
        one.only(np.array([chosen(row) for row in case.rows], bool))
        for case, one in zip(results, hits, strict=True)
    ]


def _absolute(value: float | None) -> float | None:
    return None if value is None else abs(value)
