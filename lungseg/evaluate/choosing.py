"""Which settings are chosen of what was tried on val.

First what ranks candidates: mirror images, the smallest volume and the score, by the CPM or by F2 at one
false positive a scan. Then the threshold of the masks and the score that a nodule must reach, by F2 of what
they mark, with at most one false positive a scan; simpler is what leaves the threshold, on which a nodule's
outline depends. Either time the simplest is taken whose value is within one standard error of the best
(Breiman et al., Classification and Regression Trees, 1984): a smaller lead on so few scans means nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, Self

import numpy as np

from lungseg.config import SegmentConfig
from lungseg.config.fields import CandidateScore
from lungseg.errors import DataError
from lungseg.evaluate.bootstrap import Statistic, ratio, resample
from lungseg.evaluate.froc import OPERATING_POINTS, Hits, sensitivities
from lungseg.evaluate.marks import SCORES
from lungseg.evaluate.records import cpm

By = Literal["cpm", "f2"]
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIN_SCORES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)
VOLUMES_MM3 = (0.0, 14.0, 30.0, 60.0)
FALSE_POSITIVES = 1.0
"""A scan, at most or just so many."""
REPLICATES = 1000
Ranking = tuple[bool, float, CandidateScore]
"""Mirror images, smallest volume, score."""
Masking = tuple[Ranking, float, float]
"""What ranks candidates, threshold, lowest score."""


@dataclass(frozen=True)
class Choices:
    """The settings that are tried."""

    mirror: tuple[bool, ...]
    min_volume_mm3: tuple[float, ...]
    candidate_score: tuple[CandidateScore, ...]
    threshold: tuple[float, ...]
    min_score: tuple[float, ...]

    @classmethod
    def of(cls, own: SegmentConfig, fixed: Collection[str]) -> Self:
        """All, and the model's own; of the `fixed` ones that alone."""
        every: dict[str, tuple[Any, ...]] = {
            "mirror": (False, True),
            "min_volume_mm3": VOLUMES_MM3,
            "candidate_score": SCORES,
            "threshold": THRESHOLDS,
            "min_score": MIN_SCORES,
        }
        mine = {name: getattr(own, name) for name in every}
        return cls(
            **{
                name: (mine[name],) if name in fixed else tuple(sorted({*values, mine[name]}))
                for name, values in every.items()
            }
        )


@dataclass(frozen=True)
class Tried:
    """One scan: what its candidates hit, and how many nodules its masks touch, and how many false positives
    they have, by the settings."""

    case_id: str
    patient: int
    nodules: int
    hits: Mapping[Ranking, Hits]
    masks: Mapping[Masking, tuple[int, int]]


@dataclass(frozen=True)
class Option:
    """One set of settings; the lower `complexity` is, the simpler they are."""

    settings: dict[str, Any]
    complexity: tuple[float, ...]
    statistic: Statistic
    allowed: bool = True


@dataclass(frozen=True)
class Pick:
    """What was chosen of all options, the best value and its standard error, and every option's value."""

    chosen: Option
    value: float
    best: float
    standard_error: float
    rows: list[dict[str, Any]]


def pick(options: Sequence[Option], weights: np.ndarray) -> Pick:
    """The simplest option that is allowed and within one standard error of the best; of equally simple ones
    the better. `weights` are draws of patients, as of `resample`."""
    once = np.ones((1, weights.shape[1]), np.int64)
    values = [float(one.statistic(once)[0]) for one in options]
    allowed = [number for number, one in enumerate(options) if one.allowed and not np.isnan(values[number])]
    best = max(allowed, key=lambda number: values[number])
    error = float(np.nanstd(options[best].statistic(weights)))
    near = [number for number in allowed if values[number] >= values[best] - error]
    chosen = min(near, key=lambda number: (options[number].complexity, -values[number]))
    rows = [
        {**one.settings, "value": value, "allowed": one.allowed}
        for one, value in zip(options, values, strict=True)
    ]
    return Pick(options[chosen], values[chosen], values[best], error, rows)


def choose(tried: Sequence[Tried], own: SegmentConfig, choices: Choices, by: By) -> tuple[Pick, Pick]:
    """Of what ranks candidates, and of what becomes a nodule. Raises DataError("no-nodules")."""
    if not any(one.nodules for one in tried):
        remedy = "prepare data with nodules among the patients of val, or another data.split.seed"
        raise DataError("no-nodules", split="val", remedy=remedy)
    weights = resample([one.patient for one in tried], REPLICATES)
    rankings = list(product(choices.mirror, choices.min_volume_mm3, choices.candidate_score))
    of_rankings = [_ranking(tried, one, own, by) for one in rankings]
    ranking = pick(of_rankings, weights)
    chosen = rankings[of_rankings.index(ranking.chosen)]
    counts = {
        (threshold, score): [one.masks[chosen, threshold, score] for one in tried]
        for threshold, score in product(choices.threshold, choices.min_score)
    }
    errors = {one: sum(wrong for _, wrong in found) for one, found in counts.items()}
    most = max(FALSE_POSITIVES * len(tried), min(errors.values()))
    masks = [
        Option(
            {
                "threshold": threshold,
                "min_score": score,
                "false_positives_per_scan": errors[threshold, score] / len(tried),
            },
            (abs(threshold - own.threshold), abs(score - own.min_score)),
            _f2_of_masks(tried, found),
            errors[threshold, score] <= most,
        )
        for (threshold, score), found in counts.items()
    ]
    return ranking, pick(masks, weights)


def _ranking(tried: Sequence[Tried], one: Ranking, own: SegmentConfig, by: By) -> Option:
    mirror, volume_mm3, score = one
    changes = (volume_mm3 != own.min_volume_mm3) + (score != own.candidate_score)
    settings = {"mirror": mirror, "min_volume_mm3": volume_mm3, "candidate_score": score}
    hits = [scan.hits[one] for scan in tried]
    return Option(settings, (mirror, changes), cpm(hits) if by == "cpm" else f2_at_one(hits))


def f2_at_one(scans: Sequence[Hits]) -> Statistic:
    """F2 where the FROC has one false positive a scan: 5 TP / (5 TP + 4 FN + FP)."""
    nodules = np.array([len(scan.nodule_scores) for scan in scans])

    def statistic(weights: np.ndarray) -> np.ndarray:
        found = sensitivities(scans, weights)[:, OPERATING_POINTS.index(FALSE_POSITIVES)]
        of_all, wrong = weights @ nodules, FALSE_POSITIVES * weights.sum(axis=1)
        return np.asarray(5 * found * of_all / (found * of_all + 4 * of_all + wrong))

    return statistic


def _f2_of_masks(tried: Sequence[Tried], found: Sequence[tuple[int, int]]) -> Statistic:
    return ratio(
        [5 * hit for hit, _ in found],
        [hit + 4 * one.nodules + wrong for one, (hit, wrong) in zip(tried, found, strict=True)],
    )
