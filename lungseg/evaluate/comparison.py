"""Evaluations of the store against each other, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lungseg.evaluate.bootstrap import LEVEL, REPLICATES, Interval
from lungseg.evaluate.compare import Comparison, Figure, compare
from lungseg.evaluate.report import HEADLINES
from lungseg.evaluate.stored import StoredEvaluation, require_same_scans
from lungseg.show import table

SCHEMA_VERSION = 1
TITLES = HEADLINES | {
    "cpm_luna16": "CPM (LUNA16: within the radius)",
    "cpm_overlap": "CPM (nnDetection: IoU > 0.1)",
}
LOWER_IS_BETTER = ("false_positives_per_scan", "cross_entropy")
COMPARED = (
    "dice",
    "soft_dice",
    "per_nodule_dice",
    "dice_misses_as_0",
    "dice_errors_as_0",
    "crop_dice",
    "surface_dice_1mm",
    "surface_dice_2mm",
    "f1",
    "pq",
    "f1_at_iou_half",
    "pq_at_iou_half",
    "sensitivity",
    "false_positives_per_scan",
    "cpm_luna16",
    "cpm_overlap",
)
"""Figures over the same scans and nodules in every run. Those of found nodules alone, such as HD95, are left
out: a run would gain by missing the hard ones."""


def compare_evaluations(evaluations: Sequence[StoredEvaluation]) -> Comparison:
    """Raises DataError("evaluations-differ")."""
    require_same_scans(evaluations)
    of_runs = {one.run: one.figures() for one in evaluations}
    figures = {
        name: Figure(name not in LOWER_IS_BETTER, {run: found[name] for run, found in of_runs.items()})
        for name in COMPARED
    }
    return compare(figures, evaluations[0].patients)


def to_tree(evaluations: Sequence[StoredEvaluation], found: Comparison) -> dict[str, Any]:
    facts = ("run", "checkpoint", "created_utc")
    return {
        "schema_version": SCHEMA_VERSION,
        "data": evaluations[0].data,
        "manifest_sha256": evaluations[0].manifest_sha256,
        "split": evaluations[0].split,
        "scans": len(evaluations[0].case_ids),
        "patients": len(set(evaluations[0].patients)),
        "level": LEVEL,
        "replicates": REPLICATES,
        "evaluations": [{name: getattr(one, name) for name in facts} for one in evaluations],
        **asdict(found),
    }


def as_text(evaluations: Sequence[StoredEvaluation], found: Comparison) -> str:
    first = evaluations[0]
    runs = [one.run for one in evaluations]
    patients = len(set(first.patients))
    parts = [
        f"{' against '.join(runs)}: {len(first.case_ids)} scans of {patients} patients, split {first.split} "
        f"of data set {first.data}",
        *(f"{one.run}: checkpoint {one.checkpoint}, evaluated {one.created_utc}" for one in evaluations),
        f"In brackets {LEVEL:.0%} intervals over {REPLICATES:,} draws of patients, the same for all.",
    ]
    if any(one.difference.means_little for one in found.differences):
        parts.append("Of so few patients the intervals mean little.")
    values = [
        [TITLES[name], *(_between(of_runs[run]) for run in runs)] for name, of_runs in found.values.items()
    ]
    differences = [
        [
            TITLES[one.figure],
            f"{one.b} - {one.a}",
            _between(one.difference, sign="+"),
            _show(one.p),
            _show(one.p_holm),
        ]
        for one in found.differences
    ]
    tests = sum(one.p is not None for one in found.differences)
    parts += [
        "",
        table(["figure", *runs], values),
        "",
        f"p: Wilcoxon's signed-rank test over patients; corrected: by Holm for all {tests} tests",
        table(["figure", "runs", "difference", "p", "corrected"], differences),
    ]
    return "\n".join([*parts, *(_ranks(found, runs) if len(runs) > 2 else [])]) + "\n"


def _ranks(found: Comparison, runs: Sequence[str]) -> list[str]:
    places = [str(place + 1) for place in range(len(runs))]
    rows = [
        [TITLES[name], run, *(f"{share:.0%}" for share in of_runs[run])]
        for name, of_runs in found.ranks.items()
        for run in runs
    ]
    return ["", "In which share of the draws a run has each rank", table(["figure", "run", *places], rows)]


def _between(one: Interval, sign: str = "") -> str:
    if one.value is None:
        return "-"
    return f"{one.value:{sign}.4f} [{one.low:{sign}.4f}, {one.high:{sign}.4f}]"


def _show(p: float | None) -> str:
    return "-" if p is None else f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
