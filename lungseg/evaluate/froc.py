"""Detection: which marks hit which nodules, and the free-response curve (FROC) that follows.

Two rules of what a hit is, each named for itself. `luna16_hits` is that of LUNA16's evaluation script (Setio
et al., Medical Image Analysis 2017), `overlap_hits` that of nnDetection (Baumgartner et al., MICCAI 2021).
Both give one `Hits` a scan, from which curve, sensitivities and intervals follow alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

OPERATING_POINTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives a scan at which LUNA16 reads the sensitivity; their mean is its CPM."""
MAX_MARKS = 100
MISSED = -np.inf
OVERLAP_IOU = 0.1


@dataclass(frozen=True)
class Hits:
    """One scan. `nodule_scores` [nodules] is the score at which each is found, MISSED where it never is;
    `false_positive_scores` are those of marks on nothing. Marks that are neither are in neither."""

    nodule_scores: np.ndarray
    false_positive_scores: np.ndarray

    def only(self, chosen: np.ndarray) -> Hits:
        """The same scan for a stratum: marks on its other nodules are neither hits nor false positives."""
        return replace(self, nodule_scores=self.nodule_scores[chosen])


@dataclass(frozen=True)
class Curve:
    """Points of the FROC, one a distinct score and the origin before them, in falling order of `thresholds`
    (the first is infinite): marks from that score on give these false positives a scan on average, and find
    this share of all nodules (NaN where there is none)."""

    thresholds: np.ndarray
    false_positives_per_scan: np.ndarray
    sensitivity: np.ndarray

    def at(self, false_positives_per_scan: float | Sequence[float] = OPERATING_POINTS) -> np.ndarray:
        """Sensitivities there, linear between points, constant after the last."""
        return np.interp(false_positives_per_scan, self.false_positives_per_scan, self.sensitivity)

    @property
    def cpm(self) -> float:
        """LUNA16's competition performance metric: the mean sensitivity at OPERATING_POINTS."""
        return float(self.at().mean())

    def threshold_at(self, false_positives_per_scan: float) -> float:
        """The lowest score from which marks give at most so many false positives a scan; infinite where
        the best-scored ones already give more."""
        allowed = self.false_positives_per_scan <= false_positives_per_scan
        return float(self.thresholds[allowed][-1])


def luna16_hits(
    marks_mm: np.ndarray,
    scores: np.ndarray,
    nodules_mm: np.ndarray,
    diameters_mm: np.ndarray,
    excluded_mm: np.ndarray,
    excluded_diameters_mm: np.ndarray,
) -> Hits:
    """By LUNA16's script (`noduleCADEvaluationLUNA16.py`), to the letter.

    A mark hits a nodule if it lies nearer to its centre than half its diameter. A nodule is found at the
    highest score of the marks that hit it; the others on it are neither. A mark that hits two finds both. A
    mark that hits none is a false positive, unless it hits an excluded finding. Of more than MAX_MARKS marks,
    those count that score higher than the one after the last, so that none of its equals does.
    Positions are [n, 3] in mm, in any one frame.
    """
    kept = _first_marks(scores)
    marks_mm, scores = marks_mm[kept], scores[kept]
    hits = _within(marks_mm, nodules_mm, diameters_mm)
    irrelevant = _within(marks_mm, excluded_mm, excluded_diameters_mm).any(axis=1)
    found_at = np.where(hits, scores[:, None], MISSED).max(axis=0, initial=MISSED)
    return Hits(found_at, scores[~hits.any(axis=1) & ~irrelevant])


def luna16_kinds(
    marks_mm: np.ndarray,
    scores: np.ndarray,
    nodules_mm: np.ndarray,
    diameters_mm: np.ndarray,
    excluded_mm: np.ndarray,
    excluded_diameters_mm: np.ndarray,
) -> list[tuple[str, int]]:
    """What each mark is by `luna16_hits`, and the first nodule that it hits, or -1: "nodule", "second" on one
    that a better mark hits, "excluded", "false positive", or "too many"."""
    kept = _first_marks(scores)
    hits = _within(marks_mm, nodules_mm, diameters_mm) & kept[:, None]
    excluded = np.asarray(_within(marks_mm, excluded_mm, excluded_diameters_mm).any(axis=1))
    best = np.where(hits, scores[:, None], MISSED).max(axis=0, initial=MISSED)
    found = []
    for mark, score in enumerate(scores):
        on = np.flatnonzero(hits[mark])
        if on.size:
            found.append(("nodule" if (score >= best[on]).any() else "second", int(on[0])))
        elif not kept[mark]:
            found.append(("too many", -1))
        else:
            found.append(("excluded" if excluded[mark] else "false positive", -1))
    return found


def overlap_hits(
    iou: np.ndarray, scores: np.ndarray, on_ignored: np.ndarray, min_iou: float = OVERLAP_IOU
) -> Hits:
    """By nnDetection's rule: marks, the best score first, take the free nodule that they overlap most, at an
    IoU above `min_iou`; a second mark on a nodule is a false positive.

    `iou` is [marks, nodules], of masks rather than of boxes. A mark that finds nothing is dropped where
    `on_ignored` [marks], and a false positive elsewhere.
    """
    found_at = np.full(iou.shape[1], MISSED)
    false_positives = []
    for mark in np.argsort(-scores, kind="stable"):
        free = np.where(found_at == MISSED, iou[mark], 0)
        nodule = int(free.argmax()) if free.size else 0
        if free.size and free[nodule] > min_iou:
            found_at[nodule] = scores[mark]
        elif not on_ignored[mark]:
            false_positives.append(scores[mark])
    return Hits(found_at, np.array(false_positives, np.float64))


def froc(scans: Sequence[Hits]) -> Curve:
    """The curve of all scans together; nodules that are never found stay in the denominator."""
    pooled = _pool(scans)
    [false_positives], [found] = pooled.cumulated(np.ones((1, len(scans))))
    nodules = sum(len(scan.nodule_scores) for scan in scans)
    share = found / nodules if nodules else np.full(len(found), np.nan)
    return Curve(pooled.thresholds, false_positives / len(scans), share)


def sensitivities(scans: Sequence[Hits], weights: np.ndarray) -> np.ndarray:
    """[replicates, OPERATING_POINTS]: what `froc(…).at()` gives where scan i is there `weights[:, i]` times.

    `weights` is [replicates, scans], as `bootstrap.resample` makes it; nodules are counted anew in each
    replicate. NaN in one that has none.
    """
    pooled = _pool(scans)
    nodules = weights @ [len(scan.nodule_scores) for scan in scans]
    result = np.full((len(weights), len(OPERATING_POINTS)), np.nan)
    for start in range(0, len(weights), 100):  # of all at once, the sums would take gigabytes
        part = slice(start, start + 100)
        false_positives, found = pooled.cumulated(weights[part])
        per_scan = false_positives / weights[part].sum(axis=1, keepdims=True)
        for row, count in enumerate(nodules[part]):
            if count:
                shares = found[row] / count
                result[start + row] = np.interp(OPERATING_POINTS, per_scan[row], shares)
    return result


@dataclass(frozen=True)
class _Pool:
    """Marks of all scans in falling order of their score."""

    scores: np.ndarray
    scans: np.ndarray
    found: np.ndarray

    @property
    def _last_of_equals(self) -> np.ndarray:
        return np.flatnonzero(np.diff(self.scores, append=MISSED))

    @property
    def thresholds(self) -> np.ndarray:
        return np.concatenate([[np.inf], self.scores[self._last_of_equals]])

    def cumulated(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[replicates, thresholds]: false positives and nodules found from each threshold on."""
        counts = weights[:, self.scans]
        false_positives, found = (
            np.pad(np.cumsum(counts * kind, axis=1)[:, self._last_of_equals], ((0, 0), (1, 0)))
            for kind in (~self.found, self.found)
        )
        return false_positives, found


def _pool(scans: Iterable[Hits]) -> _Pool:
    scores, numbers, found = [np.empty(0)], [np.empty(0, np.intp)], [np.empty(0, bool)]
    for number, scan in enumerate(scans):
        detected = scan.nodule_scores[scan.nodule_scores > MISSED]
        for values, kind in ((detected, True), (scan.false_positive_scores, False)):
            scores.append(values)
            numbers.append(np.full(len(values), number))
            found.append(np.full(len(values), kind))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Pool(*(np.concatenate(parts)[order] for parts in (scores, numbers, found)))


def _first_marks(scores: np.ndarray) -> np.ndarray:
    """bool [marks], of those that count."""
    return (
        scores > np.sort(scores)[::-1][MAX_MARKS] if len(scores) > MAX_MARKS else np.ones(len(scores), bool)
    )


def _within(marks_mm: np.ndarray, findings_mm: np.ndarray, diameters_mm: np.ndarray) -> np.ndarray:
    """bool [marks, findings]."""
    offsets = np.reshape(marks_mm, (-1, 1, 3)) - np.reshape(findings_mm, (1, -1, 3))
    return (offsets**2).sum(axis=-1) < (np.asarray(diameters_mm) / 2) ** 2
