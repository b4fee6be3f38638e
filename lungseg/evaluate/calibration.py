"""Whether a candidate's score is the chance that it is a nodule.

Candidates are what the FROC counts: a nodule at the score at which it is found, and false positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.evaluate.froc import MISSED, Hits

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """The reliability diagram (DeGroot and Fienberg, 1983) in BINS bins of one width over [0, 1]: candidates
    in each, their mean score and the share of nodules among them, NaN in an empty bin.

    `ece` is the expected calibration error (Naeini et al., 2015), the mean distance of the two weighted by
    candidates; `brier` the mean squared distance of score and truth (Brier, 1950). None without candidates.
    """

    candidates: np.ndarray
    mean_score: np.ndarray
    nodule_share: np.ndarray
    ece: float | None
    brier: float | None


def reliability(scans: Sequence[Hits]) -> Reliability:
    """Of all scans together. Scores must be probabilities."""
    found = [scan.nodule_scores[scan.nodule_scores > MISSED] for scan in scans]
    wrong = [scan.false_positive_scores for scan in scans]
    scores = np.concatenate([np.empty(0), *found, *wrong])
    true = np.arange(len(scores)) < sum(map(len, found))
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    candidates = np.bincount(bins, minlength=BINS)
    mean_score, nodule_share = (
        np.divide(
            np.bincount(bins, values, BINS), candidates, out=np.full(BINS, np.nan), where=candidates > 0
        )
        for values in (scores, true)
    )
    if not scores.size:
        return Reliability(candidates, mean_score, nodule_share, None, None)
    apart = np.nan_to_num(np.abs(mean_score - nodule_share))
    ece = float(apart @ candidates / scores.size)
    return Reliability(candidates, mean_score, nodule_share, ece, float(((scores - true) ** 2).mean()))
