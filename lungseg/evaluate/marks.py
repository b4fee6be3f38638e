"""Detection in one scan: its candidates, what each is on, and what the FROC needs of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lungseg.config import SegmentConfig
from lungseg.config.fields import CandidateScore
from lungseg.dataset.case import Nodule
from lungseg.dataset.stored_scans import StoredScan
from lungseg.evaluate.froc import OVERLAP_IOU, Hits, luna16_hits, luna16_kinds, overlap_hits
from lungseg.evaluate.kept import Prediction
from lungseg.evaluate.matching import overlap
from lungseg.evaluate.nodule import NoduleScore, diameters_mm
from lungseg.scan.volume import Vector
from lungseg.segment.candidates import Candidate, find_candidates

SCORES: tuple[CandidateScore, ...] = ("max", "mean", "p95", "volume_weighted")
UNKNOWN_DIAMETER_MM = 10.0
"""What LUNA16's script takes for a finding without a diameter, such as a mere point."""


@dataclass(frozen=True)
class Mark:
    """One candidate; `score` is the configured one. `luna16` is what it is by LUNA16's rule (see
    `luna16_kinds`), `nodule_id` the nodule that it hits, or "". `iou` is the largest with any nodule, and
    `overlap` whether it exceeds nnDetection's bound."""

    candidate: Candidate
    score: float
    luna16: str
    nodule_id: str
    iou: float
    overlap: bool

    def to_row(self) -> dict[str, Any]:
        """Every figure by name, for a table."""
        one = self.candidate
        x, y, z = one.centre_lps_mm
        return {
            "candidate": one.label,
            "x_lps_mm": x,
            "y_lps_mm": y,
            "z_lps_mm": z,
            "volume_mm3": one.volume_mm3,
            "score": self.score,
            **{kind: one.score(kind) for kind in SCORES},
            "luna16": self.luna16,
            "nodule_id": self.nodule_id,
            "iou": self.iou,
            "overlap": self.overlap,
        }


@dataclass(frozen=True)
class Detection:
    """`luna16` is by the kind of score, `overlap` by the configured one; nodules are in the order of the
    scan's rows."""

    luna16: Mapping[CandidateScore, Hits]
    overlap: Hits
    marks: tuple[Mark, ...]


def detect(
    stored: StoredScan, prediction: Prediction, config: SegmentConfig, rows: Sequence[NoduleScore]
) -> Detection:
    """Candidates are found, and laid over the nodules, on the grid that the network works on; positions and
    diameters are in mm whatever the grid."""
    labels, found = find_candidates(prediction.float32, prediction.geometry, config, prediction.lungs)
    numbers = stored.numbers[prediction.box_in(stored.volume.geometry)]
    counted = overlap(np.maximum(numbers, 0), labels, numbers < 0)
    iou = np.zeros((len(found), len(rows)))
    at = {number: row for row, number in enumerate(counted.nodules.tolist())}
    for column, one in enumerate(rows):
        if one.number in at:
            iou[counted.components - 1, column] = counted.iou[at[one.number]]
    on_ignored = np.zeros(len(found), bool)
    on_ignored[counted.components - 1] = counted.ignored()

    scores = {kind: np.array([one.score(kind) for one in found]) for kind in SCORES}
    chosen = scores[config.candidate_score]
    marks_mm = _positions(one.centre_lps_mm for one in found)
    places = _places([(one.nodule, one.diameter_mm) for one in rows], stored.truth.regions)
    kinds = luna16_kinds(marks_mm, chosen, *places)
    marks = (
        Mark(
            candidate=one,
            score=float(chosen[number]),
            luna16=kinds[number][0],
            nodule_id=rows[kinds[number][1]].nodule.nodule_id if kinds[number][1] >= 0 else "",
            iou=float(iou[number].max(initial=0)),
            overlap=bool((iou[number] > OVERLAP_IOU).any()),
        )
        for number, one in enumerate(found)
    )
    return Detection(
        luna16={kind: luna16_hits(marks_mm, values, *places) for kind, values in scores.items()},
        overlap=overlap_hits(iou, chosen, on_ignored),
        marks=tuple(marks),
    )


def candidate_hits(stored: StoredScan, found: Sequence[Candidate]) -> dict[CandidateScore, Hits]:
    """As the `luna16` of `detect`, without scores of nodules, which take many times as long."""
    marks_mm = _positions(one.centre_lps_mm for one in found)
    places = _places(diameters_mm(stored.truth), stored.truth.regions)
    return {
        kind: luna16_hits(marks_mm, np.array([one.score(kind) for one in found]), *places) for kind in SCORES
    }


def _positions(points: Iterable[Vector]) -> np.ndarray:
    return np.array(list(points), np.float64).reshape(-1, 3)


def _places(nodules: Sequence[tuple[Nodule, float]], regions: Sequence[Nodule]) -> tuple[np.ndarray, ...]:
    """Centres and diameters of nodules, and of what is excluded."""
    diameters = [
        one.mean_reader_diameter_mm if one.readers else one.equivalent_diameter_mm for one in regions
    ]
    return (
        _positions(one.centre_lps_mm for one, _ in nodules),
        np.array([diameter_mm or UNKNOWN_DIAMETER_MM for _, diameter_mm in nodules]),
        _positions(one.centre_lps_mm for one in regions),
        np.array([one or UNKNOWN_DIAMETER_MM for one in diameters]),
    )
