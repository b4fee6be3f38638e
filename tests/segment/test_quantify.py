"""Measurements in mm, against closed forms and SimpleITK's shape statistics."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lungseg.config import SegmentConfig
from lungseg.scan.volume import Geometry, Volume, to_sitk
from lungseg.segment.axes import rounded
from lungseg.segment.postprocess import components
from lungseg.segment.quantify import NoduleMeasurement, labels_on_scan, quantify

IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
# Feet-first and turned by 20 degrees about the patient's long axis.
C, S = math.cos(math.radians(20)), math.sin(math.radians(20))
TURNED = ((-C, -S, 0.0), (-S, C, 0.0), (0.0, 0.0, -1.0))
# Coronal storage: slices run to the back, rows to the feet.
CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))
MM = (1.0, 1.0, 1.0)
EDGE_MM = 0.4  # a network's: from 0.27 to 0.73 over 0.8 mm


def grid(
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float] = MM,
    direction: tuple = IDENTITY,
    origin: tuple[float, float, float] = (-31.0, 12.5, 140.0),
) -> Geometry:
    return Geometry(shape, spacing_mm, origin, direction)


def lps_mm(geometry: Geometry) -> np.ndarray:
    return geometry.to_lps_mm(np.stack(np.indices(geometry.shape_zyx), axis=-1))


def ellipsoid(geometry: Geometry, centre: np.ndarray, axes_mm: tuple[float, float, float]) -> np.ndarray:
    """Probability of an ellipsoid with these axes along x, y, z: 0.5 on its surface."""
    half = np.divide(axes_mm, 2)
    off = lps_mm(geometry) - centre
    scaled, slope = (np.linalg.norm(off / divisor, axis=-1) for divisor in (half, half**2))
    distance_mm = scaled * (scaled - 1) / np.maximum(slope, 1e-9)  # to first order in the distance
    return (1 / (1 + np.exp(np.clip(distance_mm, -30, 30) / EDGE_MM))).astype(np.float32)


def flat(geometry: Geometry, hu: int = 0) -> Volume:
    return Volume(np.full(geometry.shape_zyx, hu, np.int16), geometry)


def measure(
    probability: np.ndarray, working: Geometry, volume: Volume, **more: object
) -> list[NoduleMeasurement]:
    labels, _ = ndimage.label(probability > 0.5)
    own, found, _ = quantify(labels, probability, working, volume, SegmentConfig(), **more)
    assert [one.label for one in found] == list(range(1, len(found) + 1))
    assert [one.voxels for one in found] == np.bincount(own.ravel())[1:].tolist()
    return found


@pytest.mark.parametrize("slice_mm", [0.5, 1.0, 2.0, 3.0])
def test_the_volume_of_balls_is_right_within_2_percent_from_6_mm_on(slice_mm: float) -> None:
    random = np.random.default_rng(1)
    for diameter, tolerance in ((4, 0.05), (6, 0.02), (8, 0.02), (12, 0.01), (20, 0.005), (30, 0.005)):
        volumes, in_voxels = [], []
        working = grid((diameter + 14,) * 3)
        for _ in range(6 if diameter < 10 else 1):
            place = working.to_lps_mm(np.array([diameter / 2 + 6.5] * 3) + random.uniform(-0.5, 0.5, 3))
            scan = grid(
                (int((diameter + 13) / slice_mm), *(int((diameter + 13) / 0.7),) * 2),
                (slice_mm, 0.7, 0.7),
                origin=tuple(np.array(working.origin_lps_mm) + random.uniform(0, 0.7, 3)),
            )
            probability = ellipsoid(working, place, (diameter,) * 3)
            (ball,) = measure(probability, working, flat(scan))
            volumes.append(ball.volume_mm3)
            in_voxels.append(ball.voxels * slice_mm * 0.49)
        truth = math.pi / 6 * diameter**3
        assert np.mean(volumes) == pytest.approx(truth, rel=tolerance)
        assert np.ptp(volumes) < 0.03 * truth
        assert np.mean(in_voxels) == pytest.approx(truth, rel=0.15 if diameter < 10 else 0.03)


@pytest.mark.parametrize("slice_mm", [1.0, 2.0, 3.0])
def test_both_axes_are_right_within_a_tenth_of_a_mm_on_pixels_of_0_7_mm(slice_mm: float) -> None:
    random = np.random.default_rng(2)
    shapes = [
        (4, 4, 4),
        (6, 6, 6),
        (8, 8, 8),
        (14, 14, 14),
        (24, 24, 24),
        (9, 6, 8),
        (16, 10, 12),
        (30, 20, 16),
    ]
    for axes_mm in shapes:
        side = max(axes_mm) + 12
        working = grid((side, side, side))
        scan = grid((int(side / slice_mm), *(int(side / 0.7),) * 2), (slice_mm, 0.7, 0.7))
        errors = []
        for _ in range(5 if side < 20 else 1):
            place = working.to_lps_mm(np.array([side / 2] * 3) + random.uniform(-0.5, 0.5, 3))
            (one,) = measure(ellipsoid(working, place, axes_mm), working, flat(scan))
            errors.append(
                (
                    one.longest_axial_diameter_mm - axes_mm[0],
                    one.perpendicular_axial_diameter_mm - axes_mm[1],
                )
            )
            assert one.mean_axial_diameter_mm == pytest.approx(sum(axes_mm[:2]) / 2, abs=0.25)
        assert np.abs(np.mean(errors, axis=0)).max() < 0.1, axes_mm


@pytest.mark.parametrize("direction", [IDENTITY, TURNED, CORONAL])
def test_axes_are_axial_to_the_patient_at_right_angles_and_in_their_slice(direction: tuple) -> None:
    """A body of 10 x 6 mm across, turned by 30 degrees, and 24 mm along the patient's long axis."""
    scan = grid((36, 40, 44), (1.0, 0.9, 0.8), direction)
    middle = scan.to_lps_mm((17.6, 20.2, 21.7))
    off = lps_mm(scan) - middle
    c, s = math.cos(math.radians(30)), math.sin(math.radians(30))
    along, across = c * off[..., 0] + s * off[..., 1], c * off[..., 1] - s * off[..., 0]
    radius = np.sqrt((along / 5) ** 2 + (across / 3) ** 2 + (off[..., 2] / 12) ** 2)
    (one,) = measure((1 / (1 + np.exp((radius - 1) * 6))).astype(np.float32), scan, flat(scan))

    assert one.longest_axial_diameter_mm == pytest.approx(10, abs=0.15)
    assert one.perpendicular_axial_diameter_mm == pytest.approx(6, abs=0.15)
    (a, b), (d, e) = np.array(one.long_axis_lps_mm), np.array(one.short_axis_lps_mm)
    assert np.linalg.norm(a - b) == pytest.approx(one.longest_axial_diameter_mm)
    assert np.linalg.norm(d - e) == pytest.approx(one.perpendicular_axial_diameter_mm)
    assert (a - b) @ (d - e) == pytest.approx(0, abs=1e-6)
    assert abs((a - b) @ [c, s, 0]) == pytest.approx(10, abs=0.2)
    indices = scan.to_index_zyx(np.array([a, b, d, e]))
    axial = 1 if direction is CORONAL else 0
    assert np.ptp(indices[:, axial]) < 1e-6, "one plane"
    assert abs(indices[0, axial] - one.axial_slice) <= 0.5
    assert one.centre_lps_mm == pytest.approx(tuple(middle), abs=0.1)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from([TURNED, CORONAL]))
def test_measurements_do_not_depend_on_how_the_scan_is_stored(seed: int, direction: tuple) -> None:
    blob = ndimage.gaussian_filter(np.random.default_rng(seed).random((10, 10, 10)), 1.5)
    blob = ((blob - blob.min()) / np.ptp(blob)).astype(np.float32)
    sizes = ("volume_mm3", "surface_mm2", "longest_axial_diameter_mm", "perpendicular_axial_diameter_mm")

    def count_and_sizes(array: np.ndarray, scan: Geometry) -> list[float]:
        found = measure(array, scan, flat(scan))
        # Of specks of a voxel or two the surface may differ by more, since triangles meet corners otherwise.
        largest = max(found, key=lambda one: one.volume_mm3)
        return [len(found), *(getattr(largest, name) for name in sizes)]

    upright = grid(blob.shape)
    # The same blob, as the other storage has its axes.
    index = np.rint(upright.to_index_zyx(lps_mm(grid(blob.shape, MM, CORONAL)))).astype(int)
    index -= index.min(axis=(0, 1, 2))
    stored = blob[tuple(np.moveaxis(index, -1, 0))] if direction is CORONAL else blob
    stored_as = grid(blob.shape, MM, direction)
    upright_sizes = count_and_sizes(blob, upright)
    assert count_and_sizes(stored, stored_as) == pytest.approx(upright_sizes, rel=0.02, abs=0.02)
    for one in measure(blob, upright, flat(upright)):
        assert one.longest_axial_diameter_mm >= one.perpendicular_axial_diameter_mm > 0
        assert 0 < one.sphericity <= 1


def test_shape_agrees_with_itk_on_a_fine_mask() -> None:
    fine = grid((60, 70, 90), (0.25, 0.25, 0.25))
    soft = ellipsoid(fine, fine.to_lps_mm((29.3, 35.1, 44.6)), (18, 12, 10))
    statistics = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(to_sitk((soft > 0.5).astype(np.uint8), fine))
    (one,) = measure(soft, fine, flat(fine))
    assert one.volume_mm3 == pytest.approx(statistics.GetPhysicalSize(1), rel=0.005)
    assert one.surface_mm2 == pytest.approx(statistics.GetPerimeter(1), rel=0.02)
    assert one.sphericity == pytest.approx(statistics.GetRoundness(1), abs=0.02)
    assert one.equivalent_diameter_mm == pytest.approx(
        2 * statistics.GetEquivalentSphericalRadius(1), rel=0.002
    )
    assert one.centre_lps_mm == pytest.approx(statistics.GetCentroid(1), abs=0.02)


def test_diameters_are_rounded_last_and_halves_go_up() -> None:
    assert [rounded(value, "0.1") for value in (5.95, 4.25, 5.949, 6.0)] == [6.0, 4.3, 5.9, 6.0]
    assert [rounded(value, "1") for value in (5.5, 6.5, 5.49, 8.51)] == [6, 7, 5, 9]
    working = grid((24, 24, 24))
    (one,) = measure(
        ellipsoid(working, working.to_lps_mm((11.5,) * 3), (7.4, 5.5, 6)), working, flat(working)
    )
    assert one.lung_rads_2022_diameter_mm == rounded(one.mean_axial_diameter_mm, "0.1")
    assert one.fleischner_2017_diameter_mm == 6


def test_hu_mass_and_the_solid_part_are_those_of_the_voxels() -> None:
    """A part-solid nodule: 20 mm of -600 HU around 9 mm of 40 HU."""
    scan = grid((30, 44, 44), (1.0, 0.7, 0.7))
    centre = scan.to_lps_mm((14.6, 21.8, 22.1))
    hu = -600 + 640 * ellipsoid(scan, centre, (9, 9, 9))
    (one,) = measure(ellipsoid(scan, centre, (20, 20, 20)), scan, Volume(hu.astype(np.int16), scan))
    core = (4.5 / 10) ** 3
    assert one.mean_hu == pytest.approx(-600 + 640 * core, abs=10)
    assert one.sd_hu == pytest.approx(640 * math.sqrt(core * (1 - core)), rel=0.15)
    assert one.percentiles_hu == pytest.approx(
        {"5": -600, "25": -600, "50": -600, "75": -600, "95": 0}, abs=40
    )
    assert one.mass_mg == pytest.approx(one.volume_mm3 * (one.mean_hu + 1000) / 1000)
    assert one.solid_volume_mm3 == pytest.approx(math.pi / 6 * 9**3, rel=0.05)
    assert one.solid_longest_axial_diameter_mm == pytest.approx(9, abs=0.1)
    (glass,) = measure(ellipsoid(scan, centre, (20, 20, 20)), scan, flat(scan, -600))
    assert (glass.solid_volume_mm3, glass.solid_longest_axial_diameter_mm) == (0, None)


@pytest.mark.parametrize("direction", [IDENTITY, TURNED])
def test_the_pleura_is_as_far_as_the_lungs_border_and_the_side_is_the_patients(direction: tuple) -> None:
    working = grid((40, 60, 120), MM, direction)
    lungs = np.zeros(working.shape_zyx, np.uint8)
    lungs[5:35, 5:55, 5:50] = lungs[5:35, 5:55, 70:115] = 1
    # 12 mm of lung from the ball's centre to its outer side, and a ball that reaches beyond it.
    places = [working.to_lps_mm((20, 30, 4.5 + 12)), working.to_lps_mm((20, 30, 114.5 - 2))]
    soft = np.maximum(*(ellipsoid(working, place, (8, 8, 8)) for place in places))
    found = sorted(measure(soft, working, flat(working), lungs=lungs), key=lambda one: one.pleura_mm or 0)
    assert [one.pleura_mm for one in found] == [0, pytest.approx(8, abs=0.5)]
    x_mm = [one.centre_lps_mm[0] for one in found]
    assert [one.side for one in found] == [
        "left" if x > y else "right" for x, y in zip(x_mm, x_mm[::-1], strict=True)
    ]
    (middle,) = measure(
        ellipsoid(working, working.to_lps_mm((20, 30, 63)), (8, 8, 8)), working, flat(working)
    )
    assert (middle.pleura_mm, middle.side) == (None, None)
    (middle,) = measure(
        ellipsoid(working, working.to_lps_mm((20, 30, 63)), (8, 8, 8)), working, flat(working), lungs=lungs
    )
    assert middle.side is None


def test_labels_fall_in_volume_and_what_no_slice_meets_is_left_out() -> None:
    working = grid((40, 30, 60))
    scan = grid((8, 30, 60), (5.0, 1.0, 1.0))
    soft = np.zeros(working.shape_zyx, np.float32)
    for at, size in (((10, 12, 10), 7), ((21, 12, 30), 12), ((17.5, 12, 50), 3)):  # slices at 15 and 20
        soft = np.maximum(soft, ellipsoid(working, working.to_lps_mm(at), (size,) * 3))
    own, found, _ = quantify(ndimage.label(soft > 0.5)[0], soft, working, flat(scan), SegmentConfig())
    assert [round(one.equivalent_diameter_mm) for one in found] == [12, 7]
    assert own.dtype == np.int32
    for one in found:
        inside = np.argwhere(own == one.label)
        assert len(inside) == one.voxels
        assert scan.to_lps_mm(inside.mean(axis=0)) == pytest.approx(one.centre_lps_mm, abs=1.5)
    assert not own[..., 45:].any()


def test_a_mask_is_measured_as_a_probability_of_0_and_1() -> None:
    scan = grid((40, 60, 56), (1.25, 0.7, 0.8), TURNED)
    centre = scan.to_lps_mm((19.3, 30.6, 27.2))
    mask = np.linalg.norm(lps_mm(scan) - centre, axis=-1) <= 8
    (ball,) = measure(mask.astype(np.float32), scan, flat(scan, 40))
    assert ball.voxels == np.count_nonzero(mask)
    assert ball.volume_mm3 == pytest.approx(4 / 3 * math.pi * 8**3, rel=0.02)
    assert ball.longest_axial_diameter_mm == pytest.approx(16, abs=0.6)
    assert (ball.mean_hu, ball.sd_hu) == (40, 0)


def test_json_holds_every_field_in_plain_numbers() -> None:
    one_voxel = grid((1, 1, 1))
    (one,) = measure(np.ones((1, 1, 1), np.float32), one_voxel, flat(one_voxel, 5))
    plain = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert list(plain) == [field.name for field in fields(one)]
    assert (plain["label"], plain["voxels"], plain["mean_hu"], plain["probability"]) == (1, 1, 5.0, 1.0)
    assert plain["centre_lps_mm"] == [-31.0, 12.5, 140.0]
    assert plain["percentiles_hu"]["95"] == 5.0
    assert len(plain["long_axis_lps_mm"]) == 2


def test_labels_without_sizes_are_the_same_voxels() -> None:
    """Of blobs of any shape, some of which touch, on a grid with other steps."""
    random = np.random.default_rng(5)
    rough = ndimage.gaussian_filter(random.random((20, 30, 30)), 1.5)
    probability = (rough - rough.min()) / np.ptp(rough)
    working = Geometry((20, 30, 30), (1.0, 1.0, 1.0), (3.0, 2.0, 1.0), IDENTITY)
    scan = Geometry((10, 44, 40), (2.0, 0.7, 0.7), (3.2, 2.1, 1.3), IDENTITY)
    config = SegmentConfig(threshold=0.55, min_volume_mm3=0)
    labels = components(probability.astype(np.float32), config, working.spacing_mm)
    volume = Volume(np.zeros(scan.shape_zyx, np.int16), scan)
    sized, nodules, _ = quantify(labels, probability.astype(np.float32), working, volume, config)
    plain, boxes = labels_on_scan(labels, probability.astype(np.float32), working, scan, 0.55)
    assert len(nodules) > 5
    assert len(boxes) == len(nodules)
    np.testing.assert_array_equal(plain > 0, sized > 0)
    pairs = {tuple(pair) for pair in np.stack([plain[plain > 0], sized[plain > 0]], axis=1).tolist()}
    assert len(pairs) == len(nodules)  # each is another's, whatever their order
