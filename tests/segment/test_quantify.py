"""Measurements in mm, against closed forms and brute force."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.scan.volume import Geometry, Volume
from lungseg.segment.quantify import measure

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# Feet-first and turned by 20 degrees about the patient's long axis.
C, S = math.cos(math.radians(20)), math.sin(math.radians(20))
TURNED = ((-C, -S, 0.0), (-S, C, 0.0), (0.0, 0.0, -1.0))
# Coronal storage: slices run to the back, rows to the feet.
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))


def grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], direction: tuple) -> Geometry:
    return Geometry(shape, spacing_mm, (-31.0, 12.5, 140.0), direction)


def lps_mm(geometry: Geometry) -> np.ndarray:
    return geometry.to_lps_mm(np.stack(np.indices(geometry.shape_zyx), axis=-1))


@pytest.mark.parametrize("direction", [IDENTITY, TURNED, CORONAL])
def test_a_ball_has_its_closed_form_on_any_grid(direction: tuple) -> None:
    geometry = grid((40, 60, 56), (1.25, 0.7, 0.8), direction)
    centre = geometry.to_lps_mm((19.3, 30.6, 27.2))
    inside = np.linalg.norm(lps_mm(geometry) - centre, axis=-1) <= 8
    hu = np.where(inside, 40, -850).astype(np.int16)

    (ball,) = measure(inside.astype(np.int32), Volume(hu, geometry), inside * np.float32(0.75))

    assert ball.centre_lps_mm == pytest.approx(tuple(centre), abs=0.05)
    assert ball.volume_mm3 == pytest.approx(4 / 3 * math.pi * 8**3, rel=0.01)
    assert ball.equivalent_diameter_mm == pytest.approx(16, abs=0.1)
    assert 16 <= ball.max_axial_diameter_mm < 16.8  # the faces add less than a voxel
    assert (ball.mean_hu, ball.sd_hu, ball.probability) == (40, 0, 0.75)
    assert ball.voxels == np.count_nonzero(inside)


@pytest.mark.parametrize("direction", [IDENTITY, CORONAL])
def test_the_long_axis_is_axial_to_the_patient_however_the_scan_is_stored(direction: tuple) -> None:
    """A rod of 6 x 4 mm across and 30 mm along the patient's long axis."""
    geometry = grid((50, 50, 50), (1.0, 1.0, 1.0), direction)
    offset = lps_mm(geometry) - geometry.to_lps_mm((24.5, 24.5, 24.5))
    rod = (np.abs(offset) < [3, 2, 15]).all(axis=-1)
    assert rod.sum() == 6 * 4 * 30

    (measured,) = measure(rod.astype(np.int32), Volume(np.zeros(rod.shape, np.int16), geometry))

    # Farthest face midpoints: 6 mm apart along the long side, 3 between the centres of the outer rows.
    assert measured.max_axial_diameter_mm == pytest.approx(math.hypot(6, 3))
    assert measured.probability is None


def test_one_voxel_is_as_wide_as_its_longer_side_and_lies_at_its_centre() -> None:
    geometry = grid((5, 6, 7), (3.0, 0.5, 0.8), TURNED)
    labels = np.zeros(geometry.shape_zyx, np.int32)
    labels[1, 2, 3] = 1
    (voxel,) = measure(labels, Volume(np.full(labels.shape, -7, np.int16), geometry))
    assert voxel.max_axial_diameter_mm == pytest.approx(0.8)
    assert voxel.volume_mm3 == pytest.approx(1.2)
    # Worked out by hand: origin + 3 * 0.8 * x axis + 2 * 0.5 * y axis + 1 * 3 * z axis.
    expected = (-31 - 2.4 * C - S, 12.5 - 2.4 * S + C, 137)
    assert voxel.centre_lps_mm == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_the_long_axis_agrees_with_all_pairs_of_face_midpoints(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = (random.random((3, 6, 5)) < 0.15).astype(np.int32)
    labels[0, 0, 0] = 1
    geometry = grid((3, 6, 5), (1.0, 0.7, 1.3), IDENTITY)

    (measured,) = measure(labels, Volume(np.zeros(labels.shape, np.int16), geometry))

    longest = 0.0
    for plane in labels:
        points = [
            (0.7 * (y + dy), 1.3 * (x + dx))
            for y, x in np.argwhere(plane)
            for dy, dx in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5))
        ]
        longest = max([longest, *(math.dist(a, b) for a, b in itertools.combinations(points, 2))])
    assert measured.max_axial_diameter_mm == pytest.approx(longest)


def test_hu_statistics_are_those_of_the_labels_own_voxels() -> None:
    labels = np.zeros((1, 1, 8), np.int32)
    labels[0, 0, [1, 3, 6]], labels[0, 0, 5] = 1, 3  # one within the other's box; label 2 is absent
    hu = np.array([[[0, 10, 900, 20, 900, -300, 30, 0]]], np.int16)
    one, three = measure(labels, Volume(hu, grid((1, 1, 8), (1.0, 1.0, 1.0), IDENTITY)))
    assert (one.label, one.mean_hu) == (1, 20)
    assert one.sd_hu == pytest.approx(math.sqrt(200 / 3))
    assert (three.label, three.mean_hu, three.sd_hu) == (3, -300, 0)


def test_json_holds_plain_numbers() -> None:
    geometry = grid((1, 1, 1), (1.0, 1.0, 1.0), IDENTITY)
    (one,) = measure(np.ones((1, 1, 1), np.int32), Volume(np.full((1, 1, 1), 5, np.int16), geometry))
    plain = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert plain == {
        "label": 1,
        "centre_lps_mm": [-31.0, 12.5, 140.0],
        "voxels": 1,
        "volume_mm3": 1.0,
        "equivalent_diameter_mm": 1.241,
        "max_axial_diameter_mm": 1.0,
        "mean_hu": 5.0,
        "sd_hu": 0.0,
        "probability": None,
    }
