"""Detection against LUNA16's definition written as a loop, against scikit-learn, and by hand."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from lungseg.evaluate.froc import (
    MAX_MARKS,
    MISSED,
    OPERATING_POINTS,
    Hits,
    froc,
    luna16_hits,
    luna16_kinds,
    overlap_hits,
    sensitivities,
)

Scan = tuple[np.ndarray, ...]
NOWHERE = np.empty((0, 3)), np.empty(0)


def scan_of(random: np.random.Generator) -> Scan:
    """Marks, scores, nodules, diameters, excluded findings and theirs: few places and few scores, so that
    ties, duplicates, empty scans, exact borders and marks on two nodules are common."""
    marks, nodules, excluded = random.integers(0, [8, 4, 3])
    return (
        random.integers(0, 6, (marks, 3)).astype(float),
        random.integers(1, random.choice([3, 20]), marks) / 20,
        random.integers(0, 6, (nodules, 3)).astype(float),
        random.choice([2.0, 4.0, 6.0], nodules),
        random.integers(0, 6, (excluded, 3)).astype(float),
        random.choice([2.0, 4.0], excluded),
    )


def slow_luna16(scan: Scan) -> tuple[list[float | None], list[float]]:
    """The definition, mark by mark: the score at which each nodule is found, and those of false positives."""
    marks, scores, nodules, diameters, excluded, excluded_diameters = (part.tolist() for part in scan)
    found: list[float | None] = [None] * len(nodules)
    false_positives = []
    for mark, score in zip(marks, scores, strict=True):
        hit = False
        for i, (nodule, diameter) in enumerate(zip(nodules, diameters, strict=True)):
            if math.dist(mark, nodule) < diameter / 2:
                hit = True
                best = found[i]
                found[i] = score if best is None else max(best, score)
        on_excluded = any(
            math.dist(mark, place) < size / 2
            for place, size in zip(excluded, excluded_diameters, strict=True)
        )
        if not hit and not on_excluded:
            false_positives.append(score)
    return found, false_positives


def slow_sensitivity(scans: list[tuple[list[float | None], list[float]]], wanted: float) -> float:
    """At `wanted` false positives a scan: threshold by threshold, then along the line between two."""
    found = [score for scan, _ in scans for score in scan]
    if not found:
        return math.nan
    wrong = [score for _, scan in scans for score in scan]
    points = [(0.0, 0.0)]
    for threshold in sorted({score for score in [*found, *wrong] if score is not None}, reverse=True):
        false_positives = sum(score >= threshold for score in wrong) / len(scans)
        sensitivity = sum(score is not None and score >= threshold for score in found) / len(found)
        points.append((false_positives, sensitivity))
    below = [point for point in points if point[0] <= wanted][-1]
    above = next((point for point in points if point[0] > wanted), None)
    if above is None:
        return below[1]
    share = (wanted - below[0]) / (above[0] - below[0])
    return below[1] + share * (above[1] - below[1])


def by_roc_curve(scans: list[Hits]) -> np.ndarray:
    """Sensitivities as LUNA16's script takes them from scikit-learn: misses are left out of the ROC and
    come back in the denominator, and a system without false positives has none at every threshold."""
    found = np.concatenate([scan.nodule_scores for scan in scans])
    detected = found[found > MISSED]
    wrong = np.concatenate([scan.false_positive_scores for scan in scans])
    truth = np.concatenate([np.ones(len(detected)), np.zeros(len(wrong))])
    fpr, tpr, _ = roc_curve(truth, np.concatenate([detected, wrong]))
    false_positives = fpr * len(wrong) / len(scans) if len(wrong) else np.zeros(len(fpr))
    return np.interp(OPERATING_POINTS, false_positives, tpr * len(detected) / len(found))


@settings(deadline=None)
@pytest.mark.filterwarnings("ignore:No negative samples")
@given(st.integers(0, 1 << 32))
def test_the_curve_is_that_of_the_definition_and_of_scikit_learn(seed: int) -> None:
    """5,000 cases: --hypothesis-profile=thorough."""
    random = np.random.default_rng(seed)
    scans = [scan_of(random) for _ in range(random.integers(1, 6))]
    hits, slow = [luna16_hits(*scan) for scan in scans], [slow_luna16(scan) for scan in scans]
    for mine, (found, false_positives) in zip(hits, slow, strict=True):
        assert mine.nodule_scores.tolist() == [MISSED if score is None else score for score in found]
        assert sorted(mine.false_positive_scores) == sorted(false_positives)
    for scan, mine in zip(scans, hits, strict=True):
        by_kind = [(*kind, score) for kind, score in zip(luna16_kinds(*scan), scan[1], strict=True)]
        assert [score for kind, _, score in by_kind if kind == "false positive"] == list(
            mine.false_positive_scores
        )
        hit = [nodule for kind, nodule, _ in by_kind if kind == "nodule"]
        assert set(hit) <= set(np.flatnonzero(mine.nodule_scores > MISSED))
        assert all((nodule >= 0) == (kind in ("nodule", "second")) for kind, nodule, _ in by_kind)
    curve = froc(hits)
    expected = [slow_sensitivity(slow, point) for point in OPERATING_POINTS]
    np.testing.assert_allclose(curve.at(), expected, rtol=0, atol=1e-12)
    if any((scan.nodule_scores > MISSED).any() for scan in hits):
        np.testing.assert_allclose(curve.at(), by_roc_curve(hits), rtol=0, atol=1e-12)

    weights = random.multinomial(len(scans), np.full(len(scans), 1 / len(scans)), size=3)
    for row, found_at in zip(weights, sensitivities(hits, weights), strict=True):
        drawn = [scan for scan, times in zip(hits, row, strict=True) for _ in range(times)]
        np.testing.assert_allclose(found_at, froc(drawn).at(), rtol=0, atol=1e-12)


def test_a_mark_hits_strictly_within_the_radius_and_duplicates_are_neither() -> None:
    nodule, other = (0.0, 0, 0), (20.0, 0, 0)
    marks = np.array([(2.9, 0, 0), (1.0, 0, 0), (3.0, 0, 0), (50.0, 0, 0), (60.0, 0, 0)])
    scores = np.array([0.3, 0.9, 0.8, 0.7, 0.6])
    hits = luna16_hits(marks, scores, np.array([nodule, other]), np.array([6.0, 6.0]), marks[4:], np.ones(1))
    assert hits.nodule_scores.tolist() == [0.9, MISSED]
    assert hits.false_positive_scores.tolist() == [0.8, 0.7]  # on the border, and far away
    curve = froc([hits])
    assert curve.false_positives_per_scan.tolist() == [0, 0, 1, 2]
    assert curve.sensitivity.tolist() == [0, 0.5, 0.5, 0.5]
    assert curve.thresholds.tolist() == [math.inf, 0.9, 0.8, 0.7]
    assert curve.cpm == 0.5
    assert (curve.threshold_at(1), curve.threshold_at(0.5), curve.threshold_at(9)) == (0.8, 0.9, 0.7)


def test_sensitivities_lie_on_the_line_between_two_thresholds() -> None:
    """One of 4 nodules at 0 false positives a scan, 3 at 2 a scan: at 1/8 a sixteenth of the way."""
    hits = Hits(np.array([0.9, 0.5, 0.5, MISSED]), np.array([0.5, 0.5]))
    expected = [0.25 + 0.5 * point / 2 for point in (0.125, 0.25, 0.5, 1, 2)] + [0.75, 0.75]
    assert froc([hits]).at().tolist() == pytest.approx(expected)
    assert froc([hits]).cpm == pytest.approx(sum(expected) / 7)


def test_of_too_many_marks_those_above_the_next_one_count() -> None:
    """100 of 103 would be 0.5 and better; the 101st scores 0.5 too, so that only the 90 above it are left."""
    scores = np.concatenate([np.linspace(0.6, 0.9, 90), np.full(12, 0.5), [0.1]])
    marks = np.full((len(scores), 3), 99.0)
    assert len(scores) > MAX_MARKS
    hits = luna16_hits(marks, scores, *NOWHERE, *NOWHERE)
    assert sorted(hits.false_positive_scores) == pytest.approx(sorted(scores[:90]))
    kinds = [kind for kind, _ in luna16_kinds(marks, scores, *NOWHERE, *NOWHERE)]
    assert kinds == ["false positive"] * 90 + ["too many"] * 13
    exactly = luna16_hits(marks[:MAX_MARKS], scores[:MAX_MARKS], *NOWHERE, *NOWHERE)
    assert len(exactly.false_positive_scores) == MAX_MARKS


def test_systems_without_marks_nodules_or_false_positives_have_a_curve() -> None:
    silent, nothing_there = Hits(np.array([MISSED]), np.empty(0)), Hits(np.empty(0), np.array([0.3]))
    assert froc([silent]).at().tolist() == [0] * 7
    assert math.isinf(froc([silent]).threshold_at(1))
    assert np.isnan(froc([nothing_there]).at()).all()
    assert froc([nothing_there]).false_positives_per_scan.tolist() == [0, 1]
    assert np.isnan(sensitivities([nothing_there], np.ones((2, 1), int))).all()
    perfect = Hits(np.array([0.9, 0.2]), np.empty(0))
    assert froc([perfect]).at().tolist() == [1] * 7


def test_a_stratum_keeps_the_false_positives_of_all() -> None:
    hits = Hits(np.array([0.9, MISSED, 0.4]), np.array([0.5]))
    large = hits.only(np.array([True, False, True]))
    assert large.nodule_scores.tolist() == [0.9, 0.4]
    assert froc([large]).at([0, 1]).tolist() == [0.5, 1]


def test_by_overlap_a_second_mark_on_a_nodule_is_a_false_positive() -> None:
    iou = np.array([[0.5, 0.0], [0.6, 0.2], [0.0, 0.0], [0.0, 0.1], [0.05, 0.0]])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    hits = overlap_hits(iou, scores, np.array([False, False, True, False, False]))
    # The second mark would rather have the first nodule, which is taken; an IoU of 0.1 is not above 0.1.
    assert hits.nodule_scores.tolist() == [0.9, 0.8]
    assert hits.false_positive_scores.tolist() == [0.6, 0.5]
    duplicate = overlap_hits(iou[:2, :1], scores[:2], np.zeros(2, bool))
    assert (duplicate.nodule_scores.tolist(), duplicate.false_positive_scores.tolist()) == ([0.9], [0.8])
    assert overlap_hits(np.empty((1, 0)), scores[:1], np.zeros(1, bool)).false_positive_scores == [0.9]
    assert overlap_hits(np.empty((0, 1)), scores[:0], np.zeros(0, bool)).nodule_scores == [MISSED]


def test_a_thousand_replicates_of_200_scans_take_seconds() -> None:
    random = np.random.default_rng(0)
    scans = [Hits(random.random(2), random.random(90)) for _ in range(200)]
    weights = random.multinomial(200, np.full(200, 1 / 200), size=1000)
    begun = time.process_time()
    found = sensitivities(scans, weights)
    seconds = time.process_time() - begun
    print(f"1,000 replicates of 200 scans with 92 marks each: {seconds:.1f} s")
    assert found.shape == (1000, 7)
    assert np.isfinite(found).all()
    assert seconds < 20
