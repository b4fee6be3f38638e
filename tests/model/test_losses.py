"""Losses against their textbook formulas in plain numpy, and what they do with voxels to ignore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import LossConfig, LossName
from lungseg.model.losses import Loss, coarse_mask, over_levels

NAMES = get_args(LossName)
GAMMA, ALPHA = 1.5, 0.2


def loss_of(name: str, reduction: str = "sample") -> Any:
    config = LossConfig(name=name, focal_gamma=GAMMA, tversky_alpha=ALPHA, reduction=reduction)
    return Loss(config)


def value_and_gradient(loss: Any, logits: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    variable = tf.Variable(logits, dtype=tf.float32)
    with tf.GradientTape() as tape:
        value = loss(variable, tf.constant(mask))
    return value.numpy(), tf.convert_to_tensor(tape.gradient(value, variable)).numpy()


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shape = (3, 4, 5, 6, 1)
    return random.normal(0, 3, shape), random.choice([0, 1, 255], shape, p=[0.6, 0.3, 0.1]).astype(np.uint8)


# The second implementation: one sample at a time, kept voxels alone, float64.


def tversky(p: np.ndarray, t: np.ndarray, alpha: float) -> float:
    hit, false, missed = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
    return 1 - (hit + 0.5) / (hit + alpha * false + (1 - alpha) * missed + 0.5)


def soft_dice(p: np.ndarray, t: np.ndarray) -> float:
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def focal(p: np.ndarray, t: np.ndarray, gamma: float) -> float:
    true_class = np.where(t == 1, p, 1 - p)
    return float((-((1 - true_class) ** gamma) * np.log(true_class)).mean())


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "dice": soft_dice,
    "tversky": lambda p, t: tversky(p, t, ALPHA),
    "focal_tversky": lambda p, t: tversky(p, t, ALPHA) ** 0.75,
    "bce": lambda p, t: float(-(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()),
    "focal": lambda p, t: focal(p, t, GAMMA),
}
SUMS = {"dice_bce": ("dice", "bce"), "dice_focal": ("dice", "focal")}


def expected(name: str, logits: np.ndarray, mask: np.ndarray) -> float:
    kept = mask != 255
    p, t = 1 / (1 + np.exp(-logits[kept])), (mask[kept] == 1).astype(float)
    return sum(FORMULAS[part](p, t) for part in SUMS.get(name, (name,)))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_each_sample_has_the_textbook_loss(name: str, seed: int) -> None:
    logits, mask = case(seed)
    value, _ = value_and_gradient(loss_of(name), logits, mask)
    np.testing.assert_allclose(
        value, [expected(name, one, its) for one, its in zip(logits, mask, strict=True)], rtol=2e-5
    )


@pytest.mark.parametrize("name", ["dice", "tversky", "focal_tversky"])
def test_batch_reduction_counts_overlap_over_all_samples_at_once(name: str) -> None:
    logits, mask = case(1)
    value, _ = value_and_gradient(loss_of(name, "batch"), logits, mask)
    np.testing.assert_allclose(value, [expected(name, logits, mask)] * 3, rtol=2e-5)


@pytest.mark.parametrize("name", ["bce", "focal"])
def test_cross_entropy_is_a_mean_over_each_sample_whatever_the_reduction(name: str) -> None:
    logits, mask = case(2)
    by_sample, by_batch = (value_and_gradient(loss_of(name, r), logits, mask)[0] for r in ("sample", "batch"))
    np.testing.assert_array_equal(by_sample, by_batch)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_ignored_voxels_give_neither_loss_nor_gradient(name: str, reduction: str) -> None:
    logits, mask = case(3)
    changed = np.where(mask == 255, -7 * logits + 1, logits)
    loss = loss_of(name, reduction)
    value, gradient = value_and_gradient(loss, logits, mask)
    np.testing.assert_allclose(value_and_gradient(loss, changed, mask)[0], value, rtol=1e-6)
    assert not gradient[mask == 255].any()
    assert gradient[mask != 255].all()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, 1, 255], ids=["empty", "full", "ignored"])
@pytest.mark.parametrize("logit", [-1e4, -100.0, -4.6, 0.0, 100.0, 1e4])
def test_loss_and_gradient_are_finite_at_the_extremes(
    name: str, reduction: str, value: int, logit: float
) -> None:
    logits, mask = np.full((2, 2, 2, 2, 1), logit), np.full((2, 2, 2, 2, 1), value, np.uint8)
    loss, gradient = value_and_gradient(loss_of(name, reduction), logits, mask)
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    if value == 255:
        assert loss == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradients_stay_finite_where_the_network_is_sure_and_right(gamma: float) -> None:
    loss = Loss(LossConfig(name="focal", focal_gamma=gamma))
    _, gradient = value_and_gradient(loss, np.full((1, 2, 2, 2, 1), 90.0), np.ones((1, 2, 2, 2, 1), np.uint8))
    assert np.isfinite(gradient).all()


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_almost_all() -> None:
    mask = (np.indices((1, 8, 8, 8, 1)).sum(0) % 2).astype(np.uint8)
    for name in ("dice", "tversky", "focal_tversky"):
        right, wrong = (
            value_and_gradient(loss_of(name), sign * 50 * (2.0 * mask - 1), mask)[0] for sign in (1, -1)
        )
        assert right == pytest.approx(0, abs=1e-4)
        assert wrong == pytest.approx(1, abs=0.01)


def test_a_small_tversky_alpha_punishes_misses_more() -> None:
    mask = np.zeros((1, 8, 8, 8, 1), np.uint8)
    mask[:, :4] = 1
    missed, excess = np.full(mask.shape, -50.0), np.full(mask.shape, 50.0)
    missed[:, :2], excess[:, 6:] = 50, -50  # half of the target missed; as many voxels too many
    loss = Loss(LossConfig(name="tversky", tversky_alpha=0.1))
    assert value_and_gradient(loss, missed, mask)[0] > 2 * value_and_gradient(loss, excess, mask)[0]


def test_a_coarse_voxel_is_nodule_where_any_of_its_voxels_is_else_ignored_where_any_is() -> None:
    mask = np.random.default_rng(0).choice([0, 1, 255], (2, 8, 8, 8, 1), p=[0.9, 0.05, 0.05]).astype(np.uint8)
    for factor in (1, 2, 4):
        coarse, side = coarse_mask(tf.constant(mask), factor).numpy(), 8 // factor
        for n, z, y, x in np.ndindex(2, side, side, side):
            block = mask[n, z * factor :, y * factor :, x * factor :][:factor, :factor, :factor]
            assert coarse[n, z, y, x, 0] == (1 if (block == 1).any() else 255 if (block == 255).any() else 0)


def test_deep_supervision_halves_the_weight_of_each_level_and_sums_to_one() -> None:
    mask = tf.constant(np.random.default_rng(0).choice([0, 1], (2, 8, 8, 8, 1)), tf.uint8)
    loss = loss_of("dice_bce")
    outputs = [tf.random.stateless_normal((2, s, s, s, 1), (s, 0)) for s in (8, 4, 2)]
    single = [loss(logits, coarse_mask(mask, 8 // logits.shape[1])) for logits in outputs]

    def supervised(levels: int) -> tf.Tensor:
        return over_levels(loss.value(loss.supervise(outputs[:levels], mask)))

    np.testing.assert_allclose(supervised(3), (4 * single[0] + 2 * single[1] + single[2]) / 7, rtol=1e-6)
    np.testing.assert_allclose(supervised(1), single[0], rtol=1e-6)
