"""Resampling: every voxel keeps its patient coordinate, and values are those of linear interpolation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.grids import AXES, geometry_of, turned
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.errors import GeometryError
from lungseg.scan.resample import resample, resample_mask, resample_onto
from lungseg.scan.volume import Geometry, Volume, vector


def ramp(geometry: Geometry) -> np.ndarray:
    """HU that depend on the patient coordinate alone: 7x - 5y + 3z."""
    return geometry.to_lps_mm(np.moveaxis(np.indices(geometry.shape_zyx), 0, -1)) @ (7.0, -5.0, 3.0)


@pytest.mark.parametrize("axes", [*AXES, turned((10, -20, 15)), turned((170, 30, -95))])
def test_resampling_keeps_a_ramp_over_the_patient_whatever_the_order_of_the_axes(axes):
    source = geometry_of((20, 22, 24), (1.7, 0.8, 1.1), (-9.0, 12.0, 4.0), axes)
    result = resample(Volume(np.rint(ramp(source)).astype(np.int16), source), (1.5, 1.25, 1.0))
    grid = result.geometry
    assert grid.spacing_mm == (1.5, 1.25, 1.0)
    # LPS: each axis runs nearest to +x, +y, +z.
    assert np.argmax(np.array(grid.direction_lps), axis=0).tolist() == [0, 1, 2]
    at = source.to_index_zyx(grid.to_lps_mm(np.moveaxis(np.indices(grid.shape_zyx), 0, -1)))
    between_centres = ((at >= 0) & (at <= np.array(source.shape_zyx) - 1)).all(axis=-1)
    assert between_centres.mean() > 0.7
    assert np.abs(result.volume_hu - ramp(grid))[between_centres].max() <= 1.0
    # Half a voxel from the hull of the centres and beyond, nothing: no fill value may come in.
    assert (at >= -0.5).all()
    assert (at <= np.array(source.shape_zyx) - 0.5).all()


@given(
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.floats(0.4, 4)] * 3),
    st.tuples(*[st.floats(0.5, 5)] * 3),
)
@settings(deadline=None)
def test_resampling_keeps_middle_and_extent(shape, spacing, target_mm):
    source = geometry_of(shape, spacing)
    result = resample(Volume(np.full(shape, 40, np.int16), source), target_mm)
    grid = result.geometry
    assert result.volume_hu.dtype == np.int16
    assert (result.volume_hu == 40).all()
    middle = [grid.to_lps_mm((np.array(grid.shape_zyx) - 1) / 2), source.to_lps_mm((np.array(shape) - 1) / 2)]
    assert middle[0] == pytest.approx(middle[1], abs=1e-6)
    for new, step, old, old_step in zip(grid.shape_zyx, target_mm, shape, spacing, strict=True):
        assert new == 1 or abs(new * step - old * old_step) <= step / 2 + 1e-6


def test_resampling_to_the_same_spacing_changes_nothing():
    values = np.random.default_rng(0).integers(-1000, 3000, (5, 6, 7)).astype(np.int16)
    source = geometry_of()
    result = resample(Volume(values, source), source.spacing_mm)
    assert np.array_equal(result.volume_hu, values)
    assert result.geometry.origin_lps_mm == pytest.approx(source.origin_lps_mm, abs=1e-9)


def test_halving_the_resolution_averages_neighbours():
    values = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 8)).astype(np.int16)
    result = resample(Volume(values, geometry_of((4, 6, 8), (1.0, 1.0, 1.0))), (2.0, 2.0, 2.0))
    means = values.reshape(2, 2, 3, 2, 4, 2).mean(axis=(1, 3, 5))
    assert np.abs(result.volume_hu - means).max() <= 0.5 + 1e-4


def test_on_another_grid_floats_are_interpolated_and_labels_are_the_nearest():
    source = geometry_of((3, 3, 3), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    target = geometry_of((1, 1, 7), (1.0, 1.0, 0.5), (-1.0, 1.0, 1.0))
    values = np.broadcast_to(np.array([2, 4, 8], np.uint8), (3, 3, 3)).copy()
    linear = resample_onto(values.astype(np.float32), source, target)
    # x = -1, -0.5, 0, 0.5, 1, 1.5, 2; half a voxel beyond the first centre still belongs to it.
    assert linear.dtype == np.float32
    assert linear[0, 0, [0, 2, 3, 4, 5, 6]].tolist() == [0, 2, 3, 4, 6, 8]
    nearest = resample_onto(values, source, target)
    assert nearest.dtype == np.uint8
    assert nearest[0, 0, [0, 2, 4, 6]].tolist() == [0, 2, 4, 8]
    assert set(nearest.ravel().tolist()) <= {0, 2, 4, 8}
    mask = resample_onto(values > 3, source, target)
    assert mask.dtype == np.uint8
    assert mask[0, 0, [0, 2, 4, 6]].tolist() == [0, 0, 1, 1]


def test_an_array_that_is_not_on_its_grid_is_refused():
    with pytest.raises(GeometryError) as caught:
        resample_onto(np.zeros((5, 6, 6), np.uint8), geometry_of(), geometry_of())
    assert caught.value.code == "shape-mismatch"
    with pytest.raises(GeometryError) as caught:
        resample(Volume(np.zeros((5, 6, 6), np.int16), geometry_of()), (1.0, 1.0, 1.0))
    assert caught.value.code == "shape-mismatch"


@given(
    st.integers(0, 10**6),
    st.tuples(*[st.floats(0.5, 3)] * 6),
    st.sampled_from(list(itertools.permutations(range(3)))),
    st.floats(-12, 12),
)
@settings(deadline=None, max_examples=60)
def test_a_mask_in_its_own_surroundings_is_the_mask_resampled_whole(seed, spacings, axes, shift):
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(3, 14, 3))
    mask = np.zeros(shape, bool)
    low = random.integers(0, shape)
    mask[tuple(slice(a, a + int(random.integers(0, 6))) for a in low)] = True
    mask &= random.random(shape) < 0.8
    direction = np.eye(3)[list(axes)] * random.choice([-1, 1], 3)
    source = Geometry(shape, spacings[:3], (3.0, -5.0, 8.0), tuple(vector(row) for row in direction))
    grid = geometry_of((12, 17, 15), spacings[3:], (-8.0 + shift, -14.0, -3.0))
    whole = resample_onto(mask.astype(np.float32), source, grid)
    decided = np.abs(whole - 0.5) > 1e-4
    np.testing.assert_array_equal(resample_mask(mask, source, grid)[decided], whole[decided] > 0.5)


@given(
    st.integers(0, 10**6),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.floats(0.4, 4)] * 6),
    st.tuples(*[st.floats(-180, 180)] * 3),
)
@settings(deadline=None, max_examples=60)
def test_one_axis_after_the_other_is_what_simpleitk_makes_of_any_grids(seed, shape, spacings, angles_deg):
    values = np.random.default_rng(seed).integers(-1024, 3000, shape).astype(np.int16)
    source = geometry_of(shape, spacings[:3], direction=turned(angles_deg))
    result = resample(Volume(values, source), spacings[3:])
    expected = resample_onto(values.astype(np.float32), source, result.geometry)
    # Within rounding of half a voxel beyond the outermost centres, to SimpleITK a voxel may lie outside.
    sure = resample_onto(np.ones(shape, np.float32), source, result.geometry) > 0.5
    assert sure.mean() > 0.5 or min(shape) == 1
    assert np.abs(result.volume_hu - expected)[sure].max(initial=0) <= 0.5 + 0.01
