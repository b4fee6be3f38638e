"""Sliding windows: every voxel is predicted at its own place, whatever the windows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import Recipe, parse_recipe
from lungseg.errors import ConfigError, RunError
from lungseg.segment.sliding import predict_volume

SIDES = st.tuples(*[st.sampled_from([4, 8, 12])] * 3)
SHAPES = st.tuples(*[st.integers(1, 21)] * 3)


def asking(multiple: int = 16, **segment: object) -> Recipe:
    """A recipe of a network of that stride, with patches of the same shape."""
    patch, depth = {"shape_zyx": [multiple] * 3}, multiple.bit_length()
    return parse_recipe({"data": {"patch": patch}, "model": {"depth": depth}, "segment": segment})


def pointwise(hu: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-hu / 300))


def distinct(shape: tuple[int, ...]) -> np.ndarray:
    """No two voxels alike, so that a voxel in a wrong place is seen."""
    return np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.int16) - 1000


@settings(deadline=None, max_examples=60)
@given(SHAPES, SIDES, st.floats(0, 0.9), st.integers(1, 3))
def test_a_pointwise_network_gives_the_pointwise_result(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, batch: int
) -> None:
    volume = distinct(shape)
    recipe = asking(4, window_zyx=list(window), overlap=overlap, batch=batch)

    result = predict_volume(pointwise, volume, recipe)

    assert result.dtype == np.float32
    assert result.shape == shape
    np.testing.assert_allclose(result, pointwise(volume.astype(np.float64)), rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(SHAPES, SIDES, st.floats(0, 0.9))
def test_the_weights_of_all_windows_sum_to_one_at_every_voxel(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float
) -> None:
    recipe = asking(4, window_zyx=list(window), overlap=overlap)
    assert (predict_volume(np.ones_like, np.zeros(shape, np.int16), recipe) == 1).all()


def test_overlapping_windows_are_averaged_with_gaussian_weights() -> None:
    """A network that answers the index within its window: two windows of 16 at 0 and 8 over 24 slices."""

    def local_index(hu: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.arange(16.0).reshape(1, 16, 1, 1, 1), hu.shape)

    recipe = asking(window_zyx=[16, 16, 16], overlap=0.5, second_looks=0)
    result = predict_volume(local_index, np.zeros((24, 16, 16), np.int16), recipe)

    def weight(i: int) -> float:
        return float(np.exp(-((i - 7.5) ** 2) / 2 / 2**2)) if 0 <= i < 16 else 0.0

    expected = [
        sum(weight(z - start) * (z - start) for start in (0, 8)) / sum(weight(z - start) for start in (0, 8))
        for z in range(24)
    ]
    np.testing.assert_allclose(result[:, 3, 5], expected, rtol=1e-5)


def test_every_call_has_one_shape_and_only_a_volume_below_the_stride_is_centred_in_air() -> None:
    calls: list[np.ndarray] = []

    def watch(hu: np.ndarray) -> np.ndarray:
        calls.append(hu.copy())
        return np.zeros_like(hu)

    recipe = asking(window_zyx=[96, 32, 16], overlap=0, batch=4)
    predict_volume(watch, np.full((20, 70, 15), 7, np.int16), recipe)
    calls.sort(key=lambda call: -np.count_nonzero(call == 7))  # two are asked at a time

    # 20 slices have two windows of 16, 70 rows three of 32, and 15 columns one of 16, in which one is air.
    assert [call.shape for call in calls] == [(4, 16, 32, 16, 1)] * 2
    assert calls[0].dtype == np.float32
    for window in (*calls[0], *calls[1][:2]):
        assert (window[:, :, :15] == 7).all()
        assert (window[..., 15, :] == -1024).all()


def test_windows_without_lungs_are_skipped_and_left_at_zero() -> None:
    shape, settings = (8, 8, 40), {"window_zyx": [8, 8, 8], "overlap": 0, "batch": 2}
    lungs = np.zeros(shape, np.uint8)
    lungs[4, 4, 9] = lungs[4, 4, 30] = 1
    seen: list[tuple[int, int]] = []

    result = predict_volume(
        np.ones_like,
        np.zeros(shape, np.int16),
        asking(8, **settings),
        lungs=lungs,
        progress=lambda done, of: seen.append((done, of)),
    )

    assert seen == [(2, 2)]
    np.testing.assert_array_equal(result[0, 0], np.repeat([0, 1, 0, 1, 0], 8))
    everywhere = asking(8, **settings, lungs_only=False)
    assert predict_volume(np.ones_like, np.zeros(shape, np.int16), everywhere, lungs=lungs).all()


def test_progress_counts_windows_up_to_all() -> None:
    seen: list[tuple[int, int]] = []
    recipe = asking(window_zyx=[16, 16, 16], overlap=0, batch=2)
    volume = np.zeros((16, 16, 80), np.int16)
    predict_volume(np.zeros_like, volume, recipe, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_the_network_is_at_the_next_window_while_one_is_worked_on() -> None:
    asked = [threading.Event() for _ in range(3)]
    waiting = iter(asked)

    def predict(hu: np.ndarray) -> np.ndarray:
        next(waiting).set()
        return np.zeros_like(hu)

    def work(done: int, windows: int) -> None:
        assert done == windows or asked[done].wait(timeout=60)

    recipe = asking(window_zyx=[16, 16, 16], overlap=0)
    predict_volume(predict, np.zeros((16, 16, 48), np.int16), recipe, progress=work)
    assert all(event.is_set() for event in asked)


def test_a_network_that_answers_nan_is_an_error_and_not_an_empty_mask() -> None:
    with pytest.raises(RunError, match="prediction-not-finite"):
        predict_volume(lambda hu: hu * np.nan, np.zeros((4, 4, 4), np.int16), asking())


def test_a_window_that_the_network_cannot_halve_is_refused() -> None:
    with pytest.raises(ConfigError, match="window-indivisible"):
        predict_volume(pointwise, np.zeros((4, 4, 4), np.int16), asking(window_zyx=[96, 96, 90]))


def test_only_the_lungs_box_and_its_context_is_tiled_and_every_voxel_keeps_its_place() -> None:
    volume = distinct((60, 64, 68)) % 997
    lungs = np.zeros(volume.shape, np.uint8)
    lungs[20:28, 24:32, 40:44] = 1
    calls: list[int] = []
    recipe = asking(window_zyx=[16, 16, 16], overlap=0.0)

    result = predict_volume(
        pointwise, volume, recipe, lungs=lungs, progress=lambda _, windows: calls.append(windows)
    )

    np.testing.assert_allclose(
        result[lungs == 1], pointwise(volume[lungs == 1].astype(np.float64)), rtol=1e-5
    )
    assert 0 < calls[-1] <= 8  # of 100 that tile the scan
    assert (predict_volume(pointwise, volume, recipe, lungs=np.zeros_like(lungs)) == 0).all()


def test_mirroring_takes_out_what_depends_on_the_side() -> None:
    """A predictor that adds a ramp along each axis, which is 0 on average over its mirror images."""
    ramp = sum(np.meshgrid(*[np.linspace(-s, s, 16) for s in (0.1, 0.2, 0.05)], indexing="ij"))

    def lopsided(windows: np.ndarray) -> np.ndarray:
        return windows / 1000 + ramp[..., np.newaxis]

    hu = np.random.default_rng(0).integers(0, 900, (16, 16, 16)).astype(np.int16)
    plain = asking(window_zyx=[16, 16, 16], second_looks=0)
    assert np.abs(predict_volume(lopsided, hu, plain) - hu / 1000).max() > 0.3
    even = predict_volume(lopsided, hu, asking(window_zyx=[16, 16, 16], mirror=True))
    np.testing.assert_allclose(even, hu / 1000, atol=1e-6)
