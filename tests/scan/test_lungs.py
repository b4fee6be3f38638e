"""Lungs: found on real and made scans, whatever the order of the axes, with vessels and nodules inside."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from lungseg.scan.dicom import read_series
from lungseg.scan.lungs import _blocks, _onto_voxels, lung_mask
from lungseg.scan.resample import resample, resample_onto
from lungseg.scan.volume import Geometry, Volume, read_image

REAL = Path(__file__).parents[3] / "shared" / "data"
SPACING = (3.0, 1.6, 1.6)
IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def ball(grid_mm: np.ndarray, centre, radii) -> np.ndarray:
    return (((grid_mm - np.array(centre)) / np.array(radii)) ** 2).sum(axis=-1) <= 1


@functools.cache
def made_chest(bridge: bool = False) -> tuple[Volume, np.ndarray, dict[str, np.ndarray]]:
    """A chest of ellipsoids in noise, the truth, and what a threshold alone gets wrong."""
    shape = (100, 200, 220)
    at = np.stack(np.indices(shape), axis=-1) * SPACING  # (z, y, x) mm in 300 x 320 x 352
    body = (((at[..., 1:] - (150, 176)) / (120, 165)) ** 2).sum(axis=-1) <= 1
    lungs = ball(at, (150, 150, 95), (125, 90, 62)) | ball(at, (150, 150, 257), (125, 90, 62))
    parts = {
        "vessel": ball(at, (150, 150, 95), (80, 5, 5)),
        "nodule": ball(at, (150, 150, 95), (25, 25, 25)),
        "pleural nodule": ball(at, (150, 65, 257), (7, 7, 7)),
        "gas": ball(at, (20, 100, 176), (15, 30, 30)),
    }
    hu = np.where(body, 40, -1000)
    hu[lungs] = -850
    for name, part in parts.items():
        hu[part] = -950 if name == "gas" else 40
    if bridge:  # trachea and bronchi join the lungs
        hu[ball(at, (150, 150, 176), (8, 8, 60))] = -980
    hu[:, 180:183, :] = np.where(body[:, 180:183], hu[:, 180:183], 100)  # the table: air is shut in above it
    noise = 60 * np.random.default_rng(0).standard_normal(shape, np.float32)
    geometry = Geometry(shape, SPACING, (-176.0, -160.0, -500.0), IDENTITY)
    return Volume((hu + noise).astype(np.int16), geometry), lungs, parts


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.mark.parametrize("bridge", [False, True])
def test_lungs_are_found_with_vessels_and_nodules_but_without_gas_elsewhere(bridge):
    volume, lungs, parts = made_chest(bridge)
    found = lung_mask(volume)
    assert found.dtype == np.uint8
    assert np.unique(found).tolist() == [0, 1]
    assert dice(found > 0, lungs) > 0.97
    assert found[parts["vessel"]].mean() > 0.99
    assert found[parts["nodule"]].mean() > 0.99
    assert found[parts["pleural nodule"] & lungs].mean() > 0.9
    assert not found[parts["gas"]].any()


def test_the_mask_lies_where_the_lungs_lie_to_less_than_a_voxel():
    volume, _, _ = made_chest()
    mirrored = Volume(volume.volume_hu[:, ::-1, ::-1], volume.geometry)
    assert dice(lung_mask(mirrored)[:, ::-1, ::-1] > 0, lung_mask(volume) > 0) > 0.999


def reordered(volume: Volume, order: tuple[int, int, int], flip: int) -> Volume:
    """The same scan stored with its axes in another order, all of them backwards if `flip` is -1."""
    old = volume.geometry
    columns = np.eye(3)[:, ::-1][:, list(order)][:, ::-1] * flip  # of the x, y, z axes
    geometry = Geometry(
        tuple(old.shape_zyx[axis] for axis in order),
        tuple(old.spacing_mm[axis] for axis in order),
        tuple(old.to_lps_mm(np.array(old.shape_zyx) - 1 if flip < 0 else np.zeros(3))),
        tuple(tuple(row) for row in columns),
    )
    return Volume(volume.volume_hu.transpose(order)[(slice(None, None, flip),) * 3], geometry)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("flip", [1, -1])
def test_blank_slices_above_the_windpipe_do_not_open_the_lungs_whatever_the_axes(order, flip):
    volume, lungs, _ = made_chest(bridge=True)
    hu = volume.volume_hu.copy()
    hu[50:, 92:97, 108:112] = -980  # a windpipe to the last slice
    hu[-3:] = -1024
    found = lung_mask(reordered(Volume(hu, volume.geometry), order, flip))
    assert dice(found > 0, lungs.transpose(order)[(slice(None, None, flip),) * 3]) > 0.97


def cropped(volume: Volume, box: tuple[slice, slice, slice]) -> Volume:
    start = [one.start for one in box]
    hu = volume.volume_hu[box]
    origin = tuple(volume.geometry.to_lps_mm(start))
    return Volume(hu, Geometry(hu.shape, volume.geometry.spacing_mm, origin, volume.geometry.direction_lps))


@pytest.mark.parametrize(
    "box",
    [
        (slice(30, 80), slice(30, 170), slice(15, 205)),  # within the body, lungs cut above and below
        (slice(0, 100), slice(35, 165), slice(25, 195)),  # the sides of the lungs are cut as well
    ],
    ids=["body", "lungs"],
)
def test_a_field_of_view_that_cuts_the_body_still_shows_lungs(box):
    volume, lungs, _ = made_chest()
    assert dice(lung_mask(cropped(volume, box)) > 0, lungs[box]) > 0.96


def test_the_foam_of_a_table_is_no_lung_even_where_a_lung_is_smaller():
    volume, lungs, _ = made_chest()
    z, _, x = np.indices(lungs.shape)
    collapsed = lungs & (x > 110) & (z < 60)
    hu = np.where(collapsed, np.int16(40), volume.volume_hu)
    hu[:, 174:196, 8:212] = 100
    hu[:, 178:192, 12:208] = -985  # 2.1 litres, twice the lung that is left
    assert dice(lung_mask(Volume(hu, volume.geometry)) > 0, lungs & ~collapsed) > 0.96


def test_air_beyond_a_round_field_of_view_is_no_lung():
    volume, lungs, _ = made_chest()
    y, x = np.indices(volume.volume_hu.shape[1:])
    beyond = (1.6 * y - 150) ** 2 + (1.6 * x - 176) ** 2 > 155**2
    hu = np.where(beyond, np.int16(-3024), volume.volume_hu)
    assert dice(lung_mask(Volume(hu, volume.geometry)) > 0, lungs & ~beyond) > 0.96


def test_scans_without_lungs_give_an_empty_mask():
    volume, lungs, _ = made_chest()
    no_lungs = np.where(lungs, np.int16(40), volume.volume_hu)  # body, air around it, table, gas in the bowel
    for hu in (no_lungs, np.full_like(no_lungs, 40), np.full_like(no_lungs, -1000)):
        assert not lung_mask(Volume(hu, volume.geometry)).any()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.6)])
def test_voxels_are_interpolated_between_the_middles_of_blocks_as_itk_does(spacing):
    shape = (31, 40, 26)
    blocks, grid = _blocks(Volume(np.zeros(shape, np.int16), Geometry(shape, spacing, (5, 6, 7), IDENTITY)))
    chosen = np.random.default_rng(0).random(blocks.shape) < 0.5
    target = Geometry(shape, spacing, (5.0, 6.0, 7.0), IDENTITY)
    soft = resample_onto(chosen.astype(np.float32), grid, target)
    found = _onto_voxels(chosen, shape)
    decided = np.abs(soft - 0.5) > 1e-4
    assert decided.mean() > 0.7
    np.testing.assert_array_equal(found[decided], soft[decided] > 0.5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 300, 3), (51, 51, 51)])
def test_any_size_of_scan_is_taken(shape):
    hu = np.random.default_rng(0).integers(-1000, 500, shape).astype(np.int16)
    assert lung_mask(Volume(hu, Geometry(shape, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), IDENTITY))).shape == shape


def test_a_real_scan_agrees_with_its_label_map():
    if not (REAL / "ct64").is_dir():
        pytest.skip(
            "needs ct64/ and ct64_lungs.nrrd (a small chest CT) in ../shared/data beside the checkout"
        )
    found = lung_mask(read_series(REAL / "ct64")) > 0
    # Chest Imaging Platform's labels: the low byte is the region (thirds of both lungs), 512 is airway.
    labels = read_image(REAL / "ct64_lungs.nrrd").volume_hu
    assert dice(found, (labels & 255) > 0) == pytest.approx(0.967, abs=0.002)
    assert found[(labels & 255) > 0].mean() > 0.99


def test_a_real_scan_at_one_millimetre_has_lungs_of_a_human_size():
    if not (REAL / "ct_c3n00247").is_dir():
        pytest.skip("needs ct_c3n00247/ (a full chest CT) in ../shared/data beside the checkout")
    found = lung_mask(resample(read_series(REAL / "ct_c3n00247"), (1.0, 1.0, 1.0)))
    assert 3.0 < found.sum() / 1e6 < 6.5  # litres
    middle = found.shape[2] // 2
    for half in (found[:, :, :middle], found[:, :, middle:]):
        assert half.sum() / 1e6 > 1.2
