"""Readers beside the model, on masks that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.dataset.case import Nodule, Outlines, Truth
from lungseg.evaluate.readers import beside_readers, reader_dice
from lungseg.scan.volume import Geometry

# Three readers on the line of voxels 0 to 3.
READERS = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]], bool).reshape(3, 1, 1, 4)
GRID = Geometry(
    (3, 2, 10), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
)
BOX = (slice(1, 3), slice(0, 2), slice(4, 10))


def truth_of(readers: np.ndarray) -> Truth:
    nodule = Nodule("n1", (6.0, 0.0, 1.0), 3.0, len(readers))
    return Truth(GRID, np.zeros(GRID.shape_zyx, np.int16), (nodule,), (), {1: Outlines((1, 0, 5), readers)})


def test_each_reader_is_held_against_the_others_and_the_model_against_the_same() -> None:
    model = np.array([1, 1, 1, 0], bool).reshape(1, 1, 4)
    found = reader_dice(READERS, model, 3)
    assert found.reader_with_reader == pytest.approx((4 / 5 + 2 / 3 + 2 / 4) / 3)
    # At least half of the two others: {0, 1, 2}, {0, 1}, {0, 1, 2}.
    assert found.reader_with_others == pytest.approx((4 / 5 + 4 / 5 + 2 / 4) / 3)
    assert found.model_with_reader == pytest.approx((4 / 5 + 1 + 2 / 4) / 3)
    assert found.model_with_others == pytest.approx((1 + 4 / 5 + 1) / 3)


def test_what_the_model_marks_beyond_the_readers_box_counts_against_it() -> None:
    labels = np.zeros((2, 2, 6), np.int32)
    labels[0, 0, 1:4] = labels[1, 1, 0:2] = 2  # three voxels where readers drew, two elsewhere
    found = beside_readers(truth_of(READERS), 1, BOX, labels, 2, 5)
    assert found is not None
    assert found.model_with_reader == pytest.approx((4 / 7 + 6 / 8 + 2 / 6) / 3)


def test_a_missed_nodule_scores_nothing_beside_readers_who_agree() -> None:
    found = beside_readers(truth_of(READERS), 1, BOX, np.zeros((2, 2, 6), np.int32), None, 0)
    assert found is not None
    assert (found.model_with_reader, found.model_with_others) == (0, 0)
    assert found.reader_with_reader > 0.6


@pytest.mark.parametrize("readers", [READERS[:1], np.stack([READERS[0], np.zeros_like(READERS[0])])])
def test_one_reader_alone_is_no_agreement(readers: np.ndarray) -> None:
    labels = np.zeros((2, 2, 6), np.int32)
    assert beside_readers(truth_of(readers), 1, BOX, labels, None, 0) is None
    assert beside_readers(truth_of(readers), 2, BOX, labels, None, 0) is None
