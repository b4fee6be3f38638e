"""The step: averages, compiled and scaled steps, and a state that is all there is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from lungseg.config import load_recipe
from lungseg.errors import RunError
from lungseg.model.precision import cpu_precision, gpu_precision
from lungseg.stream.patch_stream import Batch
from lungseg.train.step import Stepper, ValSums

SHAPE = (12, 12, 12)


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    yield
    keras.mixed_precision.set_dtype_policy("float32")


def stepper(*settings: str, policy: str = "float32") -> Stepper:
    keras.mixed_precision.set_dtype_policy(policy)
    # Strided, since TensorFlow has no pooling of float16 for CPUs.
    quick = (
        "model.width=2",
        "model.depth=3",
        "model.downsampling=stride",
        "optimizer.warmup_steps=0",
        "optimizer.schedule=constant",
    )
    recipe = load_recipe(None, [*quick, "train.global_batch=2", *settings])
    return Stepper(recipe, tf.distribute.get_strategy(), total_steps=20)


def batch(step: int) -> Batch:
    random = np.random.default_rng(step)
    mask = (random.random((2, *SHAPE)) < 0.2).astype(np.uint8)
    image = np.where(mask, 0, -800) + random.normal(0, 50, mask.shape)
    return Batch(step=step, first_row=0, image_hu=image.astype(np.int16), mask=mask)


def train(one: Stepper, steps: range) -> list[tuple[float, float]]:
    return [tuple(float(part) for part in one.train(one.distribute(batch(step)))) for step in steps]  # type: ignore[misc]


@pytest.fixture(scope="module")
def plain() -> list[tuple[float, float]]:
    """Loss and gradient norm of four steps that nothing was asked of."""
    return train(stepper("train.xla=never"), range(4))


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((6, 1), "float32"), ((7, 0), "mixed_float16"), ((7, 5), "mixed_float16"), ((8, 0), "mixed_bfloat16")],
)
def test_gpus_multiply_in_the_half_precision_that_their_tensor_cores_have(
    capability: tuple[int, int], precision: str
) -> None:
    assert gpu_precision(capability) == precision


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("AuthenticAMD", "avx2 fma", "float32"),
        ("AuthenticAMD", "avx512f avx512_bf16", "mixed_bfloat16"),
        ("GenuineIntel", "avx512f avx512_bf16", "float32"),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", "mixed_bfloat16"),
    ],
)
def test_cpus_compute_in_bfloat16_only_where_that_is_faster(vendor: str, flags: str, precision: str) -> None:
    assert cpu_precision(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n") == precision


def test_the_average_follows_its_formula_and_is_what_is_published() -> None:
    one = stepper("optimizer.ema=0.9")
    path = "logits/kernel"
    average = one.weights()[path].astype(np.float64)
    for step in range(4):
        train(one, range(step, step + 1))
        now = one.training_state()["trained/" + path]
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * now
        np.testing.assert_allclose(one.weights()[path], average, rtol=1e-5)
        assert not np.array_equal(now, average)


@pytest.mark.parametrize(
    "settings", [(), ("optimizer.ema=0.9",), ("model.deep_supervision=1",), ("model.members=2",)]
)
def test_a_restored_stepper_goes_on_bit_for_bit(settings: tuple[str, ...]) -> None:
    undisturbed, resumed = stepper(*settings), stepper(*settings)
    train(undisturbed, range(2))
    saved = undisturbed.weights(), undisturbed.training_state()
    train(undisturbed, range(2, 4))
    train(resumed, range(5, 6))
    resumed.restore(*saved, "name")
    train(resumed, range(2, 4))
    for part in ("weights", "training_state"):
        expected, found = getattr(undisturbed, part)(), getattr(resumed, part)()
        assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in expected.items()}


def test_the_members_of_an_ensemble_train_as_if_each_were_alone() -> None:
    free = "optimizer.clip_norm=1e9"  # the norm that is clipped is that of all members
    ensemble, one = stepper("model.members=2", free), stepper(free)
    start, untrained = ensemble.weights(), one.training_state()
    losses, alone = [[loss for loss, _ in train(ensemble, range(3))]], {}
    for prefix in ("member0_", "member1_"):
        mine = {path.removeprefix(prefix): start[path] for path in start if path.startswith(prefix)}
        one.restore(mine, untrained, "name")
        losses.append([loss for loss, _ in train(one, range(3))])
        alone |= {prefix + path: weight for path, weight in one.weights().items()}
    np.testing.assert_allclose(losses[0], np.mean(losses[1:], axis=0), rtol=1e-4)
    for path, found in ensemble.weights().items():
        np.testing.assert_allclose(found, alone[path], atol=1e-5, err_msg=path)


def test_a_step_is_a_small_graph() -> None:
    """It takes seconds to be traced, in every worker, trial and resumed run: a loop written out for each
    weight, norm or sample makes them many."""
    one = stepper()
    train(one, range(1))
    (traced,) = one._train._list_all_concrete_functions()  # type: ignore[attr-defined]
    graph = traced.graph.as_graph_def()
    assert len(graph.node) + sum(len(function.node_def) for function in graph.library.function) < 2000


def test_an_ensemble_is_validated_by_the_mean_of_its_members() -> None:
    one = stepper("model.members=2")
    for number in range(2):  # a new network takes every voxel for background
        one.model.get_layer(f"member{number}_logits").bias.assign([0.0])
    held_out = batch(3)
    outputs = one.model(held_out.image_hu[..., np.newaxis].astype(np.float32))
    mean = np.mean([tf.sigmoid(logits) for logits in outputs], axis=0)[..., 0]
    assert 0 < np.count_nonzero(mean > 0.5) < mean.size
    assert one.validate(one.distribute(held_out)).predicted == np.count_nonzero(mean > 0.5)


def test_a_checkpoint_without_an_average_is_refused_where_one_is_asked_for() -> None:
    plain, averaging = stepper(), stepper("optimizer.ema=0.9")
    with pytest.raises(RunError, match="checkpoint-mismatch"):
        averaging.restore(plain.weights(), plain.training_state(), "name")


def test_a_compiled_step_trains_the_same_network(plain: list[tuple[float, float]]) -> None:
    """XLA is for GPUs; here it compiles the same graph for the CPU."""
    np.testing.assert_allclose(train(stepper("train.xla=always"), range(3)), plain[:3], rtol=1e-3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains_as_float32_does(policy: str, plain: list[tuple[float, float]]) -> None:
    half = train(stepper(policy=policy), range(4))
    np.testing.assert_allclose([loss for loss, _ in half], [loss for loss, _ in plain], rtol=0.02)
    np.testing.assert_allclose([norm for _, norm in half], [norm for _, norm in plain], rtol=0.1)


def test_a_step_of_infinite_gradients_is_left_out_and_the_scale_of_the_loss_halved() -> None:
    one = stepper(policy="mixed_float16")
    train(one, range(1))
    scale = one.optimizer.dynamic_scale
    before = one.weights()
    scale.assign(1e30)  # no float16 holds such a gradient
    (_, norm) = train(one, range(1, 2))[0]
    assert not np.isfinite(norm)
    assert float(scale) == pytest.approx(0.5e30)
    assert all(np.array_equal(before[path], now) for path, now in one.weights().items())


def test_the_gradient_norm_is_that_before_clipping() -> None:
    free, clipped = stepper("optimizer.clip_norm=1e9"), stepper("optimizer.clip_norm=1e-3")
    assert train(clipped, range(1))[0][1] == pytest.approx(train(free, range(1))[0][1], rel=1e-5)
    assert train(clipped, range(1))[0][1] > 0.01


def test_patches_without_nodules_give_finite_steps() -> None:
    one = stepper("loss.name=dice_focal")
    empty: Any = batch(0)
    one.train(one.distribute(Batch(0, 0, empty.image_hu, np.zeros_like(empty.mask))))
    assert all(np.isfinite(array).all() for array in one.weights().values())


@pytest.mark.parametrize("devices", [None, ["CPU:0"]])
def test_val_dice_is_of_one_volume_or_the_mean_over_patches_that_hold_a_nodule(devices: Any) -> None:
    """Three patches, one of them empty, some voxels ignored; counted again in NumPy."""
    keras.mixed_precision.set_dtype_policy("float32")
    recipe = load_recipe(None, ["model.width=2", "model.depth=3"])
    strategy = tf.distribute.MirroredStrategy(devices) if devices else tf.distribute.get_strategy()
    one = Stepper(recipe, strategy, total_steps=1)
    # A network that knows nothing predicts nothing: with this bias it predicts about half of the voxels.
    one.model.get_layer("logits").bias.assign([0.0])
    random = np.random.default_rng(0)
    image = random.normal(-400, 300, (3, *SHAPE)).astype(np.int16)
    mask = (random.random(image.shape) < 0.1).astype(np.uint8)
    mask[1] = 0
    mask[:, :2] = 255
    predicted = one.model(image[..., np.newaxis].astype(np.float32))[..., 0].numpy() > 0
    predicted &= mask != 255
    hit = (predicted & (mask == 1)).sum(axis=(1, 2, 3))
    both = predicted.sum(axis=(1, 2, 3)) + (mask == 1).sum(axis=(1, 2, 3))
    batches = [Batch(0, 0, image[[n]], mask[[n]]) for n in range(3)]
    sums = sum((one.validate(one.distribute(batch)) for batch in batches), ValSums())
    assert 0.1 < predicted.mean() < 0.9
    assert sums.dice("pooled") == pytest.approx(2 * hit.sum() / both.sum(), rel=1e-5)
    assert sums.dice("patches") == pytest.approx((2 * hit / both)[[0, 2]].mean(), rel=1e-5)
    assert ValSums().dice("pooled") == ValSums().dice("patches") == 1.0
