"""All figures of a split as one tree of plain values, from which every form of the report is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungseg.config.fields import CandidateScore
from lungseg.errors import DataError
from lungseg.evaluate import figures
from lungseg.evaluate.bootstrap import LEVEL, REPLICATES, Ratio, Statistic, bounds, interval, resample
from lungseg.evaluate.calibration import reliability
from lungseg.evaluate.case import CaseResult
from lungseg.evaluate.figures import OF_READERS, OVER_NODULES, OVER_SCANS, STRATA, over_nodules, over_scans
from lungseg.evaluate.froc import OPERATING_POINTS, Hits, froc, sensitivities
from lungseg.evaluate.marks import SCORES
from lungseg.evaluate.records import cpm, to_record

FROC_REPLICATES = 1000
"""As LUNA16 has them."""
CURVE_POINTS = 300
IN_STRATA = (
    "sensitivity",
    "dice_misses_as_0",
    "surface_dice_1mm",
    "hd95_mm",
    "volume_error_share",
    "absolute_volume_error_share",
    "diameter_error_mm",
)


def summarise(results: Sequence[CaseResult]) -> dict[str, float | int | None]:
    """Means over scans; numbers of nodules (their Dice, sensitivity) over all nodules of the split.

    Raises DataError("split-empty").
    """
    if not results:
        raise DataError(
            "split-empty", remedy="choose a split with scans, or prepare the data with larger shares"
        )
    once = np.ones((1, len(results)), np.int64)
    counts: dict[str, float | int | None] = {
        "cases": len(results),
        "nodules": sum(case.nodules for case in results),
        "detected": sum(case.detected for case in results),
        "false_positives": sum(case.false_positives for case in results),
    }
    return counts | {name: _plain(one(once)[0]) for name, one in ratios(results).items()}


def ratios(results: Sequence[CaseResult]) -> dict[str, Ratio]:
    """Every headline figure by name; those of the readers only where readers are known."""
    over_rows = dict(OVER_NODULES)
    if any(row.readers for case in results for row in case.rows):
        over_rows |= OF_READERS
    return {name: over_scans(results, name) for name in OVER_SCANS} | {
        name: over_nodules(results, value) for name, value in over_rows.items()
    }


@dataclass(frozen=True)
class Draws:
    """The same draws of patients for every figure."""

    patients: tuple[str, ...]
    weights: np.ndarray

    @staticmethod
    def of(results: Sequence[CaseResult]) -> Draws:
        patients = tuple(str(case.patient) for case in results)
        return Draws(patients, resample(patients))

    def of_figure(self, statistic: Statistic, replicates: int = REPLICATES) -> dict[str, float | None]:
        found = interval(statistic, self.patients, self.weights[:replicates])
        return {"value": found.value, "low": found.low, "high": found.high}


def summary_tree(results: Sequence[CaseResult], score: CandidateScore) -> dict[str, Any]:
    """`score` is the configured one, by which candidates are ranked. Raises DataError("split-empty")."""
    summary = summarise(results)
    draws = Draws.of(results)
    found = ratios(results)
    patients = len(set(draws.patients))
    hits = {
        "luna16": [case.detection.luna16[score] for case in results],
        "overlap": [case.detection.overlap for case in results],
    }
    empty = [case for case in results if case.both_empty]
    return {
        "summary": summary,
        "patients": patients,
        "intervals": {
            "level": LEVEL,
            "replicates": REPLICATES,
            "patients": patients,
            "means_little": interval(found["dice"], draws.patients, draws.weights).means_little,
            "figures": {name: draws.of_figure(one) for name, one in found.items()},
        },
        "seed_figures": {name: summary[name] for name in ("loss", "accuracy", "mean_iou", "dice")},
        "empty_against_empty": {
            "scans": len(empty),
            "dice_as_1": summary["dice"],
            "dice_as_nan": summary["dice_without_empty_scans"],
        },
        "detection": {
            "score": score,
            "cpm_by_score": _by_score(results),
            **{rule: _detection(found_by, draws) for rule, found_by in hits.items()},
        },
        "calibration": _calibration(hits["luna16"], score),
        "strata": {
            group: {title: _stratum(results, chosen, score, draws) for title, chosen in members.items()}
            for group, members in STRATA.items()
        },
        "record": to_record(found, hits),
        "cases": [case.figures() for case in results],
        "nodules": _nodules(results, score),
    }


def _by_score(results: Sequence[CaseResult]) -> dict[str, float | None]:
    return {kind: _plain(froc([case.detection.luna16[kind] for case in results]).cpm) for kind in SCORES}


def _detection(hits: Sequence[Hits], draws: Draws) -> dict[str, Any]:
    curve = froc(hits)
    steps = np.unique(np.linspace(0, len(curve.thresholds) - 1, CURVE_POINTS).astype(int))
    points = np.column_stack([curve.false_positives_per_scan, curve.sensitivity])[steps]
    names = [f"{at:g}" for at in OPERATING_POINTS]
    between = bounds(sensitivities(hits, draws.weights[:FROC_REPLICATES]))
    return {
        "sensitivity": {name: _plain(value) for name, value in zip(names, curve.at(), strict=True)},
        "sensitivity_bounds": {
            name: [_plain(low), _plain(high)] for name, low, high in zip(names, *between, strict=True)
        },
        "cpm": draws.of_figure(cpm(hits), FROC_REPLICATES),
        "threshold_at_1_false_positive": _plain(curve.threshold_at(1.0)),
        "curve": [[_plain(value) for value in point] for point in points],
    }


def _calibration(hits: Sequence[Hits], score: CandidateScore) -> dict[str, Any]:
    """Of scores that are probabilities; the volume-weighted one is none."""
    if score == "volume_weighted":
        return {}
    found = reliability(hits)
    bins = zip(found.candidates, found.mean_score, found.nodule_share, strict=True)
    return {
        "ece": found.ece,
        "brier": found.brier,
        "bins": [
            {"candidates": int(count), "mean_score": _plain(mean), "nodule_share": _plain(share)}
            for count, mean, share in bins
        ],
    }


def _stratum(
    results: Sequence[CaseResult], chosen: figures.Chosen, score: CandidateScore, draws: Draws
) -> dict[str, Any]:
    nodules = sum(chosen(row) for case in results for row in case.rows)
    if not nodules:
        return {"nodules": 0}
    hits = figures.chosen_hits(results, [case.detection.luna16[score] for case in results], chosen)
    wanted = {name: OVER_NODULES[name] for name in IN_STRATA}
    if any(row.readers for case in results for row in case.rows if chosen(row)):
        wanted |= OF_READERS
    return {
        "nodules": nodules,
        "cpm": _plain(froc(hits).cpm),
        **{name: draws.of_figure(over_nodules(results, one, chosen)) for name, one in wanted.items()},
    }


def _nodules(results: Sequence[CaseResult], score: CandidateScore) -> list[dict[str, Any]]:
    """One row each, with its scan."""
    return [
        {"case_id": case.case_id, "patient": case.patient, **row.to_row(), "luna16_score": _plain(at)}
        for case in results
        for row, at in zip(case.rows, case.detection.luna16[score].nodule_scores, strict=True)
    ]


def _plain(value: float) -> float | None:
    """What strict JSON can hold."""
    return float(value) if np.isfinite(value) else None
