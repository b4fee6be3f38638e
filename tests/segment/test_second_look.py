"""A place that windows found is seen again, in the middle of a window as large as a training patch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lungseg.config import Recipe, parse_recipe
from lungseg.segment.second_look import around, places
from lungseg.segment.sliding import predict_volume

WINDOW, PATCH = (32, 32, 32), (16, 16, 16)
SHAPE = (40, 64, 64)


def asking(**segment: object) -> Recipe:
    data = {"patch": {"shape_zyx": PATCH}}
    segment = {"window_zyx": WINDOW, "overlap": 0} | segment
    return parse_recipe({"data": data, "model": {"depth": 3}, "segment": segment})


class Network:
    """Takes what is dense for probable, 100 HU for 0.9, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[np.ndarray] = []

    def __call__(self, hu: np.ndarray) -> np.ndarray:
        self.asked.append(hu)
        return np.clip((hu + 800) / 1000, 0, 1).astype(np.float32)

    @property
    def looks(self) -> list[np.ndarray]:
        return [hu[0, ..., 0] for hu in self.asked if hu.shape == (1, *PATCH, 1)]


def scan(*nodules: tuple[tuple[int, int, int], int]) -> np.ndarray:
    """Air with balls of 7 voxels at (z, y, x), of so many HU."""
    hu = np.full(SHAPE, -1000, np.int16)
    grid = np.stack(np.indices(SHAPE), axis=-1)
    for place, density in nodules:
        hu[np.linalg.norm(grid - place, axis=-1) <= 3] = density
    return hu


def test_a_nodule_is_seen_in_the_middle_of_a_patch_from_four_sides() -> None:
    hu, network = scan(((20, 33, 31), 100)), Network()  # where windows of 32 meet

    predict_volume(network, hu, asking())

    # The middle of 16 voxels lies between two: a nodule that is turned about them moves by one.
    whole = hu[12:28, 25:41, 23:39]
    turned = [whole, whole[:, ::-1, ::-1], whole[::-1, :, ::-1], whole[::-1, ::-1, :]]
    assert len(network.looks) == 4
    for look, expected in zip(network.looks, turned, strict=True):
        np.testing.assert_array_equal(look, expected)


def test_what_it_says_there_outweighs_a_window_that_cut_the_nodule() -> None:
    """A network that knows a nodule only by its whole: of one that is cut it sees half."""
    hu = scan(((20, 32, 32), 100))

    def whole_only(windows: np.ndarray) -> np.ndarray:
        share = np.count_nonzero(windows == 100, axis=(1, 2, 3, 4), keepdims=True) / np.count_nonzero(
            hu == 100
        )
        return np.where(windows == 100, share, 0).astype(np.float32)

    cut = predict_volume(whole_only, hu, asking(second_looks=0))
    seen = predict_volume(whole_only, hu, asking())

    assert 0.1 < cut[hu == 100].max() < 0.5
    assert seen[hu == 100].min() > 0.95
    assert seen[hu != 100].max() == 0


def test_the_most_probable_places_come_first_and_no_more_than_asked_for() -> None:
    hu = scan(((10, 10, 10), -300), ((30, 12, 50), 100), ((12, 50, 30), -100))
    network = Network()
    predict_volume(network, hu, asking(second_looks=2))
    assert [look.max() for look in network.looks] == [100] * 4 + [-100] * 4


def test_without_second_looks_windows_alone_are_asked() -> None:
    network = Network()
    predict_volume(network, scan(((20, 32, 32), 100)), asking(second_looks=0))
    assert network.asked
    assert not network.looks


def test_with_mirror_images_each_look_is_the_mean_of_all_eight() -> None:
    network = Network()
    predict_volume(network, scan(((20, 32, 32), 100)), asking(mirror=True))
    assert len({look.tobytes() for look in network.looks}) == len(network.looks) == 8


def test_a_speck_and_what_lies_beside_the_lungs_are_not_looked_at() -> None:
    probability = np.zeros(SHAPE, np.float32)
    probability[10, 10, 10:14] = 0.9
    probability[30:33, 50:53, 50:53] = 0.9
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[:20] = 1
    assert places(probability, PATCH, asking(), None) == [[31, 51, 51]]
    assert places(probability, PATCH, asking(), lungs) == []


def test_what_is_larger_than_a_patch_is_looked_at_where_it_is_most_probable() -> None:
    probability = np.zeros(SHAPE, np.float32)
    probability[20, 20, :] = 0.3
    probability[20, 20, 50] = 0.8
    assert places(probability, PATCH, asking(), None) == [[20, 20, 50]]


def test_other_settings_of_candidates_need_no_other_looks() -> None:
    """What `evaluate` keeps of a network holds for each of them."""
    probability = np.random.default_rng(0).random(SHAPE).astype(np.float32) ** 8
    others = asking(candidate_threshold=0.6, threshold=0.9, min_volume_mm3=500)
    assert places(probability, PATCH, others, None) == places(probability, PATCH, asking(), None) != []


@given(st.tuples(*[st.integers(0, 39)] * 3), st.tuples(*[st.integers(16, 40)] * 3))
def test_a_window_never_sticks_out(place: tuple[int, ...], shape: tuple[int, ...]) -> None:
    place = tuple(min(middle, size - 1) for middle, size in zip(place, shape, strict=True))
    for middle, side, size in zip(place, around(place, PATCH, shape), shape, strict=True):
        assert 0 <= side.start <= middle < side.stop <= size
        assert side.stop - side.start == 16
        assert side.start in (middle - 8, 0, size - 16)


@pytest.mark.parametrize("shape", [(16, 64, 64), (8, 20, 17)])
def test_a_scan_smaller_than_a_patch_is_looked_at_whole(shape: tuple[int, int, int]) -> None:
    hu = np.full(shape, 100, np.int16)
    result = predict_volume(Network(), hu, asking())
    np.testing.assert_allclose(result, 0.9, rtol=1e-5)
