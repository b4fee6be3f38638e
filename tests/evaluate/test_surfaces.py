"""Surface distances against DeepMind's own, SimpleITK's filter, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import surface_distance as deepmind
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lungseg.errors import GeometryError
from lungseg.evaluate.surfaces import surface_distances

MM = (1.0, 1.0, 1.0)
SPACINGS_MM = MM, (2.5, 0.7, 0.7), (0.9, 1.3, 0.4), (1.25, 0.683, 0.683)
TOLERANCES_MM = (0.5, 1.0, 2.0)
PERCENTS = (50, 95, 100)


def cuboid(shape: tuple[int, int, int], low: tuple[int, ...], sides: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(start, start + side) for start, side in zip(low, sides, strict=True))] = True
    return mask


@settings(deadline=None)
@given(st.integers(0, 1 << 32))
def test_every_figure_is_that_of_deepminds_own_code(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape, spacing_mm = random.integers(2, 12, 3), SPACINGS_MM[random.integers(len(SPACINGS_MM))]
    a, b = (ndimage.gaussian_filter(random.normal(size=shape), random.uniform(0, 2)) > 0 for _ in range(2))
    if not a.any() or not b.any():
        return  # their code fails there with NumPy 2
    mine, theirs = surface_distances(a, b, spacing_mm), deepmind.compute_surface_distances(a, b, spacing_mm)
    sums = [theirs[f"surfel_areas_{side}"].sum() for side in ("gt", "pred")]
    means = deepmind.compute_average_surface_distance(theirs)
    pairs = [
        (mine.reference_areas_mm2.sum(), sums[0]),
        (mine.predicted_areas_mm2.sum(), sums[1]),
        (mine.mean_mm(), np.average(means, weights=sums)),
        *((mine.dice(mm), deepmind.compute_surface_dice_at_tolerance(theirs, mm)) for mm in TOLERANCES_MM),
    ]
    for ours, oracle in pairs:
        assert ours == pytest.approx(oracle, rel=0, abs=1e-6)
    for percent in PERCENTS:  # where a sum of areas is that share, the last bit says which distance is meant
        low, high = (deepmind.compute_robust_hausdorff(theirs, percent + e) for e in (-1e-9, 1e-9))
        assert low - 1e-6 <= mine.hausdorff_mm(percent) <= high + 1e-6


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1 << 32))
def test_the_greatest_distance_of_cuboids_is_that_of_simpleitk(seed: int) -> None:
    """Its filter takes whole masks in place of surfaces, which for cuboids makes no difference."""
    random = np.random.default_rng(seed)
    spacing_mm = SPACINGS_MM[random.integers(len(SPACINGS_MM))]
    masks = [
        cuboid((14, 14, 14), tuple(random.integers(0, 7, 3)), tuple(random.integers(1, 8, 3)))
        for _ in range(2)
    ]
    images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in masks]
    for image in images:
        image.SetSpacing(spacing_mm[::-1])
    theirs = sitk.HausdorffDistanceImageFilter()
    theirs.Execute(*images)
    expected_mm = theirs.GetHausdorffDistance()
    assert surface_distances(*masks, spacing_mm).hausdorff_mm(100) == pytest.approx(expected_mm, abs=1e-6)


def test_a_shifted_cube_has_its_closed_form() -> None:
    """A cube of n voxels: 6 faces of n-1 cells squared, 12 edges of n-1 bevels, 8 corners. Shifted by 1, its
    bottom and the inside of its top are 1 mm from the other's surface, all else lies on it."""
    n, bevel, corner = 8, math.sqrt(1 / 2), math.sqrt(3) / 8
    area = 6 * (n - 1) ** 2 + 12 * (n - 1) * bevel + 8 * corner
    away = 2 * (n - 1) ** 2 + 4 * (n - 1) * bevel + 4 * corner
    found = surface_distances(
        cuboid((9, 8, 8), (0, 0, 0), (n,) * 3), cuboid((9, 8, 8), (1, 0, 0), (n,) * 3), MM
    )
    assert found.reference_areas_mm2.sum() == pytest.approx(area)
    assert found.dice(0.99) == pytest.approx(1 - away / area)
    assert (found.dice(1), found.hausdorff_mm(), found.hausdorff_mm(100)) == (1, 1, 1)
    assert found.mean_mm() == pytest.approx(away / area)


def test_spacing_is_in_the_order_of_the_axes() -> None:
    a, b = cuboid((9, 4, 4), (0, 0, 0), (4, 4, 4)), cuboid((9, 4, 4), (3, 0, 0), (4, 4, 4))
    assert surface_distances(a, b, (2.5, 0.5, 0.5)).hausdorff_mm(100) == 7.5
    flat = surface_distances(a, a, (2.0, 1.0, 1.0)).reference_areas_mm2.sum()
    bevel = [0.5 * math.hypot(*pair) for pair in ((1, 1), (1, 2), (1, 2))]  # edges along z, y, x
    corner = math.sqrt((1 * 1) ** 2 + 2 * (1 * 2) ** 2) / 8
    edges = 4 * 3 * (2 * bevel[0] + bevel[1] + bevel[2])
    assert flat == pytest.approx(2 * 9 * 1 + 4 * 9 * 2 + edges + 8 * corner)


def test_balls_one_within_the_other_are_as_far_apart_as_their_radii() -> None:
    distance_mm = np.linalg.norm(np.moveaxis(np.indices((41,) * 3), 0, -1) - 20, axis=-1)
    found = surface_distances(distance_mm <= 12, distance_mm <= 15, MM)
    assert found.mean_mm() == pytest.approx(3, abs=0.5)  # to the next step of the other, not through it
    assert found.hausdorff_mm() == pytest.approx(3, abs=0.5)
    assert found.reference_areas_mm2.sum() / (4 * math.pi * 12**2) == pytest.approx(1.08, abs=0.02)


def test_empty_masks_are_told_apart_from_far_ones() -> None:
    filled, empty = cuboid((5, 5, 5), (1, 1, 1), (2, 2, 2)), np.zeros((5, 5, 5), bool)
    for pair, score in (((empty, empty), 1), ((filled, empty), 0), ((empty, filled), 0)):
        found = surface_distances(*pair, MM)
        assert found.dice(1) == score
        assert found.hausdorff_mm() is found.mean_mm() is None
        assert found.empty == (not pair[0].any(), not pair[1].any())


def test_a_mask_at_the_border_has_a_surface_there() -> None:
    whole, small = np.ones((4, 4, 4), bool), np.ones((2, 4, 4), bool)
    found = surface_distances(whole, np.pad(small, ((0, 2), (0, 0), (0, 0))), MM)
    assert found.hausdorff_mm(100) == 2


def test_masks_of_different_grids_are_refused() -> None:
    with pytest.raises(GeometryError, match="shape-mismatch"):
        surface_distances(np.ones((4, 4, 4)), np.ones((1, 4, 4)), MM)
