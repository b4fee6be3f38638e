"""Matching and its figures on masks that can be counted by hand, and against every assignment there is."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import GeometryError
from lungseg.evaluate.matching import Matching, match, overlap


def row(*runs: tuple[int, int, int], length: int = 60) -> np.ndarray:
    """int32 [1, 1, length]: each run is (label, first voxel, voxels)."""
    labels = np.zeros((1, 1, length), np.int32)
    for label, start, voxels in runs:
        labels[..., start : start + voxels] = label
    return labels


# Nodule 1 is hit by half, 2 by one voxel in ten, 5 is missed; 9 is on nothing.
NODULES = row((1, 0, 10), (2, 20, 10), (5, 40, 4))
FOUND = row((3, 5, 10), (4, 29, 4), (9, 50, 2))


def test_pairs_are_those_whose_iou_is_above_the_threshold() -> None:
    found = overlap(NODULES, FOUND)
    assert found.iou.tolist() == pytest.approx(np.array([[5 / 15, 0, 0], [0, 1 / 13, 0], [0, 0, 0]]))
    loose, strict, none = (match(found, min_iou) for min_iou in (0, 0.1, 0.5))
    assert (loose.pairs, loose.missed, loose.false_positives) == (((1, 3), (2, 4)), (5,), (9,))
    assert loose.iou == pytest.approx((1 / 3, 1 / 13))
    assert loose.dice == pytest.approx((10 / 20, 2 / 14))
    assert (strict.pairs, strict.missed, strict.false_positives) == (((1, 3),), (2, 5), (4, 9))
    assert (none.pairs, none.missed, none.false_positives) == ((), (1, 2, 5), (3, 4, 9))
    assert match(found, 1 / 3).pairs == ()  # strictly above


def pooled(scans: list[Matching], figure: str) -> float | None:
    part, whole = (sum(parts) for parts in zip(*(getattr(scan, figure) for scan in scans), strict=True))
    return part / whole if whole else None


def test_figures_of_several_scans_are_added_up_before_they_are_divided() -> None:
    scans = [match(overlap(NODULES, FOUND), 0.1), match(overlap(row((1, 0, 10)), row((1, 0, 10))), 0.1)]
    assert pooled(scans, "f1") == pytest.approx(2 / 4)  # 2 pairs, 2 misses, 2 false positives
    assert pooled(scans, "sq") == pytest.approx((1 / 3 + 1) / 2)
    assert pooled(scans, "pq") == pytest.approx((1 / 3 + 1) / 4)
    assert pooled(scans, "dice_errors_as_0") == pytest.approx(1.5 / 6)


def test_scans_without_nodules_or_components_have_the_figures_that_exist() -> None:
    empty = row()
    silent, loud, missed = (
        [match(overlap(*pair))] for pair in ((empty, empty), (empty, FOUND), (NODULES, empty))
    )
    figures = ("f1", "sq", "pq", "dice_errors_as_0")
    assert [pooled(silent, one) for one in figures] == [None] * 4
    assert [pooled(loud, one) for one in figures] == [pooled(missed, one) for one in figures]
    assert [pooled(loud, one) for one in figures] == [0, None, 0, 0]


def test_one_component_stands_for_one_nodule_and_one_nodule_for_one_component() -> None:
    joined = match(overlap(row((1, 0, 10), (2, 10, 6)), row((1, 0, 16))))
    assert (joined.pairs, joined.missed) == (((1, 1),), (2,))
    broken = match(overlap(row((1, 0, 16)), row((1, 0, 6), (2, 6, 10))))
    assert (broken.pairs, broken.false_positives) == (((1, 2),), (1,))


def test_ignored_regions_are_neither_target_nor_false_positive() -> None:
    nodules, ignore = row((1, 0, 10), (2, 30, 5)), row((1, 10, 10), (1, 30, 5))
    found = overlap(nodules, row((1, 0, 12), (2, 15, 10), (3, 18, 1), (4, 50, 3)), ignore)
    assert found.nodules.tolist() == [1]
    for min_iou, wrong in ((0.0, (4,)), (0.1, (4,)), (0.5, (2, 4))):
        result = match(found, min_iou)
        assert (result.pairs, result.iou, result.missed) == (((1, 1),), (1.0,), ())
        assert result.false_positives == wrong  # half of 2 is ignored, and all of 3


def test_labels_of_different_grids_are_refused() -> None:
    with pytest.raises(GeometryError, match="shape-mismatch"):
        overlap(NODULES, FOUND[..., 1:])


@settings(deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([0.0, 0.1, 0.5]))
def test_no_other_assignment_overlaps_more(seed: int, min_iou: float) -> None:
    random = np.random.default_rng(seed)
    nodules, components = random.integers(0, 5, (2, 1, 4, 8))
    ignore = random.random((1, 4, 8)) < 0.1
    iou = {}
    for nodule in range(1, 5):
        for component in range(1, 5):
            a, b = (nodules == nodule) & ~ignore, (components == component) & ~ignore
            iou[nodule, component] = (a & b).sum() / max((a | b).sum(), 1)
    best = max(
        sum(iou[pair] for pair in zip(order, range(1, 5), strict=True) if iou[pair] > min_iou)
        for order in permutations(range(1, 5))
    )
    result = match(overlap(nodules, components, ignore), min_iou)
    assert sum(result.iou) == pytest.approx(best)
    assert result.iou == pytest.approx([iou[pair] for pair in result.pairs])
    assert all(value > min_iou for value in result.iou)
    assert sorted([one for one, _ in result.pairs] + list(result.missed)) == [
        label for label in range(1, 5) if ((nodules == label) & ~ignore).any()
    ]
