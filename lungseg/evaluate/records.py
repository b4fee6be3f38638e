"""What an evaluation keeps of each scan, so that runs can be compared later without their networks: the parts
of which every figure is made, in the order of the scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lungseg.evaluate.bootstrap import Ratio, Statistic, ratio
from lungseg.evaluate.froc import MISSED, Hits, sensitivities


def cpm(scans: Sequence[Hits]) -> Statistic:
    """LUNA16's, as a statistic."""
    return lambda weights: np.asarray(sensitivities(scans, weights).mean(axis=1))


def to_record(ratios: Mapping[str, Ratio], hits: Mapping[str, Sequence[Hits]]) -> dict[str, Any]:
    """Plain values; `hits` are by the rule of what a hit is."""
    return {
        "ratios": {name: [one.numerators, one.denominators] for name, one in ratios.items()},
        "hits": {rule: [_hits_to_record(scan) for scan in scans] for rule, scans in hits.items()},
    }


def from_record(record: Mapping[str, Any]) -> dict[str, Statistic]:
    """Every figure by name, the CPM as cpm_RULE."""
    ratios = {name: ratio(*parts) for name, parts in record["ratios"].items()}
    found = {rule: [_hits_of(scan) for scan in scans] for rule, scans in record["hits"].items()}
    return {**ratios, **{f"cpm_{rule}": cpm(scans) for rule, scans in found.items()}}


def _hits_to_record(scan: Hits) -> dict[str, list[float | None]]:
    scores = [None if score == MISSED else score for score in scan.nodule_scores.tolist()]
    return {"nodules": scores, "false_positives": scan.false_positive_scores.tolist()}


def _hits_of(record: Mapping[str, Sequence[float | None]]) -> Hits:
    scores = [MISSED if score is None else score for score in record["nodules"]]
    return Hits(np.array(scores, np.float64), np.array(record["false_positives"], np.float64))
