"""The masks that can be made of what LIDC's readers drew, and figures over their whole database."""

from __future__ import annotations

import random
from dataclasses import replace

import lidc_figures
import numpy as np
import pytest

from lungseg.config import LidcConfig, Recipe
from lungseg.scan.volume import Geometry, Volume
from lungseg.sources.marks import Mark, label, soft_mask

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
GRID = Geometry((3, 1, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), AXIAL)
# Three readers on the line of voxels 0 to 3 of the middle slice.
OUTLINED = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]], bool).reshape(3, 1, 1, 4)
MARK = Mark((slice(1, 2), slice(0, 1), slice(0, 4)), OUTLINED, np.ones((1, 1, 4), bool), 5.0, 4.0)
SAME = np.arange(3)


@pytest.mark.parametrize(
    ("kind", "share", "expected"),
    [
        ("consensus", 0.5, [1, 1, 0, 0]),
        ("consensus", 1.0, [0, 1, 0, 0]),
        ("union", 0.5, [1, 1, 1, 0]),
        ("reader1", 0.5, [1, 1, 0, 0]),
        ("reader2", 0.5, [1, 1, 1, 0]),
        ("reader3", 0.5, [0, 1, 0, 0]),
    ],
)
def test_the_setting_says_whose_outline_is_the_target(kind, share, expected):
    config = LidcConfig(mask=kind, consensus=share)
    labelled = label(Volume(np.zeros(GRID.shape_zyx, np.int16), GRID), [MARK], SAME, config)
    assert labelled.mask[1].tolist() == [expected]
    assert labelled.mask.sum() == sum(expected)
    assert not labelled.ignore.any()
    assert [nodule.readers for nodule in labelled.nodules] == [3]


def test_reader_dice_is_the_mean_over_pairs_and_unknown_for_one_reader_or_points():
    assert MARK.reader_dice() == pytest.approx((4 / 5 + 2 / 3 + 2 / 4) / 3)
    assert replace(MARK, outlined=OUTLINED[:1]).reader_dice() is None
    assert replace(MARK, outlined=np.zeros_like(OUTLINED)).reader_dice() is None
    labelled = label(Volume(np.zeros(GRID.shape_zyx, np.int16), GRID), [MARK], SAME, LidcConfig())
    assert labelled.nodules[0].reader_dice == MARK.reader_dice()


def test_where_the_chosen_reader_drew_nothing_the_nodule_is_ignored_not_background():
    labelled = label(
        Volume(np.zeros(GRID.shape_zyx, np.int16), GRID), [MARK], SAME, LidcConfig(mask="reader4")
    )
    assert not labelled.mask.any()
    assert labelled.ignore[1].tolist() == [[1, 1, 1, 1]]
    assert labelled.nodules == ()


def test_the_soft_mask_is_the_share_of_all_four_readers():
    other = replace(MARK, outlined=np.ones((4, 1, 1, 4), bool), box=(slice(0, 1), *MARK.box[1:]))
    soft = soft_mask(GRID, [MARK, other], np.array([2, 1, 0]))
    assert soft.dtype == np.float32
    # `slices` says where a slice of the marks lies in the volume: slice 0 is the volume's last.
    assert soft[:, 0].tolist() == [[0, 0, 0, 0], [0.5, 0.75, 0.25, 0], [1, 1, 1, 1]]
    nearer = replace(MARK, outlined=OUTLINED[:1])
    np.testing.assert_array_equal(soft_mask(GRID, [nearer, MARK], SAME), soft_mask(GRID, [MARK], SAME))


def test_the_defaults_are_the_fields_protocol():
    data = Recipe().data
    assert data.lidc == LidcConfig(
        min_readers=3, consensus=0.5, min_diameter_mm=3, max_slice_thickness_mm=2.5, mask="consensus",
        ignore_others=True,
    )  # fmt: skip
    assert data.spacing_mm == (1.0, 1.0, 1.0)
    assert Recipe().model.hu_window == (-1000.0, 400.0)


@pytest.mark.slow
def test_a_sample_of_the_database_has_the_figures_of_the_command_that_counts_all_of_it():
    """`tests/lidc_figures.py` over 60 scans; its figures over all 1,018 are in tests/benchmarks/README.md."""
    chosen = random.Random(0).sample(lidc_figures.all_scans(), 60)
    nodules = [one for scan_id in chosen for one in lidc_figures.scan_figures(scan_id)]
    assert sum(annotations for annotations, *_ in nodules) == 298
    assert lidc_figures.by_readers(nodules) == {1: 28, 2: 26, 3: 26, 4: 35}
    among = lidc_figures.dice_by_size(nodules)
    assert {name: count for name, (count, _) in among.items()} == {
        "< 6": 10, "6-10": 40, "10-20": 24, ">= 20": 13,
    }  # fmt: skip
    assert [score for _, score in among.values()] == pytest.approx(
        [0.656582, 0.742420, 0.738309, 0.806808], abs=1e-6
    )
    consensus = [score for _, score in lidc_figures.dice_by_size(nodules, 3).values()]
    assert consensus == pytest.approx([0.828144, 0.867426, 0.860397, 0.897412], abs=1e-6)
