"""Patches: nodules lie in their patches, negatives are clean, and the choice is a pure function."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import PatchConfig
from lungseg.dataset.patches import Site, _draw, cut, select_sites

SIZE = (16, 12, 20)
CONFIG = PatchConfig(shape_zyx=SIZE, positives_per_nodule=5)


def chest(shape=(60, 70, 80)) -> dict[str, np.ndarray]:
    """A body of 0 HU with lungs of -850 HU, a vessel of 40 HU through them, and air around."""
    volume = np.full(shape, -1000, np.int16)
    volume[:, 4:-4, 4:-4] = 0
    lungs = np.zeros(shape, np.uint8)
    lungs[4:-4, 12:-12, 12:-12] = 1
    volume[lungs > 0] = -850
    volume[:, 30:33, 30:33] = 40
    blank = np.zeros(shape, np.uint8)
    return {"mask": blank.copy(), "lungs": lungs, "volume_hu": volume}


def with_nodule(scan: dict[str, np.ndarray], centre=(30, 50, 60), value=1) -> dict[str, np.ndarray]:
    z, y, x = centre
    scan["mask"][z - 2 : z + 3, y - 2 : y + 3, x - 2 : x + 3] = value
    return scan


def test_a_scan_gives_as_many_patches_of_each_kind_as_asked_for():
    sites = select_sites(**with_nodule(chest()), nodules_zyx=[("a", (30, 50, 60))], config=CONFIG, seed=1)
    assert Counter(site.stratum for site in sites) == {"nodule": 5, "hard": 8, "lung": 4, "outside": 2}
    assert {site.nodule_id for site in sites if site.stratum == "nodule"} == {"a"}
    assert {site.nodule_id for site in sites if site.stratum != "nodule"} == {""}
    assert len({site.centre_zyx for site in sites if site.stratum != "nodule"}) == 14


def test_the_same_seed_gives_the_same_patches_and_leaves_the_arrays_alone():
    scan = with_nodule(chest())
    before = {name: array.copy() for name, array in scan.items()}
    first, again, other = (
        select_sites(**scan, nodules_zyx=[("a", (30, 50, 60))], config=CONFIG, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert all(np.array_equal(scan[name], before[name]) for name in scan)


SHARES = [(1, 0, 0), (0.9999, 1e-4, 0), (0.99, 0.01, 0), (0.9998, 1e-4, 1e-4)]


@st.composite
def scans(draw):
    shape = draw(st.tuples(*[st.integers(5, 40)] * 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scan = {
        "mask": rng.choice([0, 1, 255], shape, p=draw(st.sampled_from(SHARES))).astype(np.uint8),
        "lungs": (rng.random(shape) < draw(st.sampled_from([0, 0.5, 1]))).astype(np.uint8),
        "volume_hu": rng.integers(-1000, 200, shape).astype(np.int16),
    }
    centre = st.tuples(*[st.floats(0, length - 1) for length in shape])
    nodules = draw(st.lists(centre, max_size=3))
    config = PatchConfig(
        shape_zyx=draw(st.tuples(*[st.integers(1, 24)] * 3)), jitter=draw(st.sampled_from([0.0, 0.6, 1.0]))
    )
    return scan, [(str(number), at) for number, at in enumerate(nodules)], config


def box_of(site: Site, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    first = np.array(site.centre_zyx) - np.array(size) // 2
    return first, first + size


@given(scans(), st.integers(0, 2**63))
@settings(deadline=None, max_examples=150)
def test_whatever_the_scan_nodules_are_inside_and_negatives_are_clean(drawn, seed):
    scan, nodules, config = drawn
    sites = select_sites(**scan, nodules_zyx=nodules, config=config, seed=seed)
    size, shape = config.shape_zyx, np.array(scan["mask"].shape)
    counts = Counter((site.stratum, site.nodule_id) for site in sites)
    asked = {"hard": 8, "lung": 4, "outside": 2}
    assert all(counts["nodule", nodule_id] == config.positives_per_nodule for nodule_id, _ in nodules)
    assert all(counts[stratum, ""] <= most for stratum, most in asked.items())
    for site in sites:
        first, stop = box_of(site, size)
        fits = shape >= size
        assert ((first >= 0) & (stop <= shape))[fits].all()
        centres = [np.rint(at) for nodule_id, at in nodules if site.nodule_id in ("", nodule_id)]
        inside = [bool(((at >= first) & (at < stop)).all()) for at in centres]
        if site.stratum == "nodule":
            assert all(inside)
            continue
        assert not any(inside)
        assert not cut(scan["mask"], site.centre_zyx, size, 0).any()


def test_negatives_lie_where_their_name_says():
    scan = chest((60, 70, 80))
    config = PatchConfig(
        shape_zyx=(3, 3, 3), hard_negatives_per_scan=40, lung_negatives_per_scan=40, outside_per_scan=40
    )
    sites = select_sites(**scan, nodules_zyx=[], config=config, seed=3)
    at = {
        stratum: tuple(np.transpose([site.centre_zyx for site in sites if site.stratum == stratum]))
        for stratum in ("hard", "lung", "outside")
    }
    assert (scan["volume_hu"][at["hard"]] == 40).all()
    assert scan["lungs"][at["hard"]].all()
    assert scan["lungs"][at["lung"]].all()
    assert (
        scan["volume_hu"][at["lung"]] == -850
    ).mean() > 0.8  # anywhere in the lungs, mostly not on vessels
    assert not scan["lungs"][at["outside"]].any()
    assert (scan["volume_hu"][at["outside"]] > -500).mean() > 0.9  # moved inside from the border at most


def test_bright_lungs_are_not_outside():
    scan = chest()
    scan["volume_hu"][:] = 40
    config = PatchConfig(shape_zyx=(3, 3, 3), outside_per_scan=60)
    sites = select_sites(**scan, nodules_zyx=[], config=config, seed=3)
    outside = np.transpose([site.centre_zyx for site in sites if site.stratum == "outside"])
    assert outside.shape == (3, 60)
    assert scan["lungs"][tuple(outside)].mean() < 0.05  # but for what was moved inside from the border


@pytest.mark.parametrize("value", [1, 255])
def test_negatives_keep_away_from_nodules_and_ignore_regions(value):
    scan = with_nodule(chest((20, 70, 80)), (10, 31, 31), value)  # on the vessel, whose other parts remain
    config = PatchConfig(shape_zyx=(20, 12, 12), hard_negatives_per_scan=8)
    sites = select_sites(**scan, nodules_zyx=[], config=config, seed=0)
    assert sites
    assert "hard" not in {site.stratum for site in sites}  # each patch on the vessel would hold the nodule


def test_jitter_spans_its_share_of_half_a_patch():
    config = PatchConfig(shape_zyx=(21, 21, 21), jitter=0.5, positives_per_nodule=300)
    sites = select_sites(**chest(), nodules_zyx=[("a", (30, 35, 40))], config=config, seed=0)
    offsets = np.array([site.centre_zyx for site in sites if site.stratum == "nodule"]) - (30, 35, 40)
    assert offsets.min(axis=0).tolist() == [-5, -5, -5]
    assert offsets.max(axis=0).tolist() == [5, 5, 5]
    assert np.abs(offsets.mean(axis=0)).max() < 0.6
    still = PatchConfig(shape_zyx=(21, 21, 21), jitter=0)
    assert select_sites(**chest(), nodules_zyx=[("a", (30, 35, 40))], config=still, seed=0)[0].centre_zyx == (
        30,
        35,
        40,
    )


def test_a_scan_smaller_than_a_patch_gives_jittered_positives_and_no_negatives():
    scan = with_nodule(chest((51, 51, 51)), (25, 25, 25))
    sites = select_sites(**scan, nodules_zyx=[("a", (25.2, 24.9, 25.4))], config=PatchConfig(), seed=0)
    assert [site.stratum for site in sites] == ["nodule"] * 4
    assert len({site.centre_zyx for site in sites}) == 4
    for site in sites:
        assert cut(scan["mask"], site.centre_zyx, (64, 64, 64), 0).shape == (64, 64, 64)
        assert cut(scan["mask"], site.centre_zyx, (64, 64, 64), 0).any()


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(-15, 15)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
)
def test_a_cut_holds_each_voxel_of_the_array_or_the_fill(shape, centre, size):
    array = np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)
    patch = cut(array, centre, size, -1024)
    assert patch.dtype == np.int16
    far = 40
    padded = np.pad(array, far, constant_values=-1024)
    first = np.array(centre) - np.array(size) // 2 + far
    expected = padded[tuple(slice(a, a + b) for a, b in zip(first, size, strict=True))]
    assert np.array_equal(patch, expected)


def test_a_cut_is_a_copy():
    array = np.zeros((4, 4, 4), np.int16)
    cut(array, (2, 2, 2), (2, 2, 2), 0)[:] = 1
    assert not array.any()


@pytest.mark.parametrize(("share", "count"), [(0.3, 400), (1e-4, 400), (0.0, 5), (0.5, 0)])
def test_draws_are_distinct_candidates_and_all_as_likely(share, count):
    """Both ways of drawing: by trial, and from a list where candidates are rare."""
    rng = np.random.default_rng(1)
    chosen = rng.random(200_000) < share
    found = _draw(lambda at: chosen[at], chosen.size, count, np.random.default_rng(2))
    assert found.size == len(set(found.tolist())) == min(count, chosen.sum())
    assert chosen[found].all()
    if share == 0.3:
        # 400 uniform numbers: their mean has a standard deviation of 0.0144, so 5 of them.
        assert abs(found.mean() / chosen.size - 0.5) < 0.072
