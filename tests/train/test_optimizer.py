"""Schedules against their closed forms, and what the optimisers leave alone."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from lungseg.config import OptimizerConfig
from lungseg.train.optimizer import Schedule, make_optimizer

PEAK, WARMUP, TOTAL = 0.02, 10, 110


def schedule(kind: str, **settings: object) -> Schedule:
    config = OptimizerConfig(learning_rate=PEAK, warmup_steps=WARMUP, schedule=kind, **settings)  # type: ignore[arg-type]
    return Schedule(config, global_batch=8, total_steps=TOTAL)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("constant", lambda t: 1.0),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("polynomial", lambda t: (1 - t) ** 0.9),
    ],
)
def test_the_rate_rises_in_the_warm_up_and_then_follows_its_formula(kind: str, formula: object) -> None:
    rate = schedule(kind)
    for step in (0, 4, 9):
        assert float(rate(step)) == pytest.approx(PEAK * (step + 1) / WARMUP)
    for step in (10, 35, 60, 109, 110, 500):
        done = min((step - WARMUP) / (TOTAL - WARMUP), 1.0)
        assert float(rate(step)) == pytest.approx(PEAK * formula(done), abs=1e-8)  # type: ignore[operator]


def test_an_end_that_moves_takes_the_schedule_with_it() -> None:
    rate = schedule("cosine")
    rate.total_steps.assign(60)
    assert float(rate(35)) == pytest.approx(PEAK / 2)


def test_a_run_shorter_than_its_warm_up_warms_up_for_half_of_it() -> None:
    rate = Schedule(OptimizerConfig(learning_rate=PEAK, warmup_steps=100), global_batch=1, total_steps=20)
    assert float(rate(9)) == pytest.approx(PEAK)
    assert float(rate(19)) < 0.1 * PEAK


def test_the_rate_grows_with_the_batch_only_where_a_reference_is_named() -> None:
    assert schedule("constant").peak == PEAK
    assert schedule("constant", reference_batch=2).peak == 4 * PEAK


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_decay_apart_from_the_gradient_and_norms_and_biases_do_not(name: str) -> None:
    config = OptimizerConfig(
        name=name, learning_rate=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant"
    )
    optimizer = make_optimizer(config, Schedule(config, 1, 10), scale_loss=False)
    variables = [keras.Variable([2.0], name=name) for name in ("kernel", "gamma", "beta", "bias")]
    optimizer.build(variables)
    optimizer.apply([tf.zeros([1])] * 4, variables)
    np.testing.assert_allclose([float(v[0]) for v in variables], [2 * (1 - 0.1 * 0.5), 2, 2, 2], rtol=1e-6)


def test_sgd_looks_ahead_as_nesterov_does() -> None:
    config = OptimizerConfig(
        name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0, warmup_steps=0, schedule="constant"
    )
    optimizer = make_optimizer(config, Schedule(config, 1, 10), scale_loss=False)
    weight = keras.Variable([1.0], name="kernel")
    optimizer.build([weight])
    expected, velocity = 1.0, 0.0
    for gradient in (0.5, -0.2, 0.3):
        optimizer.apply([tf.constant([gradient])], [weight])
        velocity = 0.9 * velocity - 0.1 * gradient
        expected += 0.9 * velocity - 0.1 * gradient
    assert float(weight[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_kernel_of_adamw_moves_weights_as_keras_does(weight_decay: float) -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(3, 5)).astype(np.float32)
    recipe = OptimizerConfig(weight_decay=weight_decay, warmup_steps=4)
    rate = Schedule(recipe, global_batch=2, total_steps=10)
    theirs = keras.optimizers.AdamW(rate, weight_decay=weight_decay)
    moved = []
    for optimizer in (make_optimizer(recipe, rate, scale_loss=False), theirs):
        weight, gradients = keras.Variable(first), np.random.default_rng(1)
        for _ in range(6):
            gradient = gradients.normal(scale=0.01, size=first.shape).astype(np.float32)
            optimizer.apply([tf.constant(gradient)], [weight])
        moved.append(weight.numpy())
    assert np.abs(moved[0] - first).max() > 1e-4
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5, atol=1e-7)
