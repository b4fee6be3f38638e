"""The network: what goes in, what comes out, that it learns, and that the file people pull is the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from lungseg.config import LossConfig, ModelConfig
from lungseg.model.losses import Loss
from lungseg.model.unet import HuWindow, build_unet, by_member, with_probability
from lungseg.runs.checkpoint import arrays
from lungseg.runs.export import export_model

TINY = ModelConfig(width=4, depth=3)


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.mixed_precision.set_dtype_policy("float32")


def volume_hu(seed: int = 0, shape: tuple[int, ...] = (2, 8, 12, 16, 1)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1200, 600, shape).astype(np.float32)


def test_the_window_maps_its_ends_to_minus_one_and_one_and_clips() -> None:
    window = HuWindow(-1000, 400)
    np.testing.assert_allclose(
        window(np.float32([-3000, -1000, -300, 400, 3000])).numpy(), [-1, -1, 0, 1, 1], atol=1e-6
    )


def test_bfloat16_loses_no_hounsfield_units_before_the_window() -> None:
    """bfloat16 has 8 bits: 401 HU and 400 HU are equal in it, and in a narrow window they must not be."""
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    model = build_unet(ModelConfig(width=2, depth=2, hu_window=(390.0, 410.0)))
    windowed = keras.Model(model.input, model.get_layer("hu_window").output)
    hu = np.arange(390, 411, dtype=np.float32)
    values = windowed(hu.reshape(1, 1, 1, -1, 1))
    assert values.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(values, tf.float32).numpy().ravel(), (hu - 400) / 10, atol=1 / 256)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("architecture", ["unet", "resenc"])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
def test_logits_are_float32_of_the_input_shape_with_every_norm(
    norm: str, policy: str, architecture: str
) -> None:
    keras.mixed_precision.set_dtype_policy(policy)
    config = ModelConfig(architecture=architecture, width=4, depth=3, norm=norm, dropout=0.1)
    logits = build_unet(config)(volume_hu())
    assert logits.dtype == tf.float32
    assert logits.shape == (2, 8, 12, 16, 1)
    assert np.isfinite(logits.numpy()).all()


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_sides_must_be_multiples_of_the_total_stride(depth: int) -> None:
    config = ModelConfig(width=2, depth=depth)
    assert config.total_stride == 2 ** (depth - 1)
    model, side = build_unet(config), config.total_stride
    assert model(volume_hu(shape=(1, 2 * side, side, 3 * side, 1))).shape[1:4] == (2 * side, side, 3 * side)
    with pytest.raises(tf.errors.InvalidArgumentError, match="ConcatOp"):
        model(volume_hu(shape=(1, 2 * side + 1, side, side, 1)))


def test_widths_double_up_to_the_limit() -> None:
    model = build_unet(ModelConfig(width=4, depth=4, max_width=10))
    assert [model.get_layer(f"encode{level}a_conv").filters for level in range(4)] == [4, 8, 10, 10]


def test_a_residual_encoder_has_the_blocks_it_is_told() -> None:
    config = ModelConfig(architecture="resenc", width=4, depth=3, residual_blocks=(1, 2, 3))
    names = {layer.name for layer in build_unet(config).layers}
    adds = sorted(name for name in names if name.endswith("_add"))
    assert adds == [f"encode{level}_{block}_add" for level in range(3) for block in range(level + 1)]
    # Where sides or channels change, the identity is averaged and projected; elsewhere it is itself.
    assert sorted(name for name in names if name.endswith("project_conv")) == [
        "encode1_0_project_conv", "encode2_0_project_conv",
    ]  # fmt: skip
    assert not any(name.startswith("decode") and name.endswith("b_conv") for name in names)


def test_a_block_whose_last_scale_is_zero_is_its_identity() -> None:
    config = ModelConfig(architecture="resenc", width=4, depth=2, residual_blocks=(2, 1))
    model = build_unet(config)
    model.get_layer("encode0_1b_norm").gamma.assign(tf.zeros([4]))
    ends = [model.get_layer(name).output for name in ("encode0_0_act", "encode0_1_act")]
    before, after = keras.Model(model.input, ends)(volume_hu())
    np.testing.assert_allclose(after, tf.nn.leaky_relu(before, 0.01), atol=1e-6)


@pytest.mark.parametrize("downsampling", ["pool", "stride"])
def test_deep_supervision_adds_logits_of_coarser_levels(downsampling: str) -> None:
    config = ModelConfig(width=2, depth=4, deep_supervision=2, downsampling=downsampling)
    model = build_unet(config)
    shapes = [output.shape for output in model(volume_hu(shape=(2, 8, 16, 24, 1)))]
    assert shapes == [(2, 8, 16, 24, 1), (2, 4, 8, 12, 1), (2, 2, 4, 6, 1)]
    assert with_probability(model, config)(volume_hu(shape=(2, 8, 16, 24, 1))).shape == (2, 8, 16, 24, 1)


@pytest.mark.parametrize("architecture", ["unet", "resenc"])
def test_an_ensemble_is_its_members_and_their_mean_probability(architecture: str) -> None:
    config = ModelConfig(architecture=architecture, width=2, depth=3, members=3, deep_supervision=1)
    model = build_unet(config)
    members = by_member(model(volume_hu()), config)
    assert [[len(logits[0]) for logits in outputs] for outputs in members] == [[8, 4]] * 3
    each = np.stack([tf.sigmoid(outputs[0]) for outputs in members])
    assert each.std(axis=0).max() > 1e-3  # they began with weights of their own
    mean = with_probability(model, config)(volume_hu())
    np.testing.assert_allclose(mean, each.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 3, "deep_supervision": 2}, "at most depth - 2"),
        ({"architecture": "resenc", "depth": 4, "residual_blocks": (1, 1)}, "must name 4 levels"),
    ],
)
def test_levels_that_a_network_lacks_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_a_new_network_takes_nodules_for_rare_whatever_it_drew(seed: int) -> None:
    keras.utils.set_random_seed(seed)
    probability = with_probability(build_unet(TINY), TINY)(volume_hu()).numpy()
    assert np.median(probability) == pytest.approx(1 / (1 + np.exp(2)), rel=0.5)


@pytest.mark.parametrize("architecture", ["unet", "resenc"])
def test_kernels_begin_as_large_as_their_inputs_ask(architecture: str) -> None:
    """He et al. (2015): a variance of 2 over the values that go into one; a transposed kernel of 2^3 is met
    once an output, and counted as Keras and PyTorch do, by the channels that come out."""
    model = build_unet(ModelConfig(architecture=architecture, width=16, depth=3))
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is not None and layer.name != "logits":
            fan_in = np.prod(kernel.shape[:-1])
            assert kernel.numpy().std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15), layer.name


def test_equal_seeds_give_equal_networks() -> None:
    first = build_unet(TINY).get_weights()
    keras.utils.set_random_seed(0)
    for one, other in zip(first, build_unet(TINY).get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_learns_four_balls_by_heart() -> None:
    random = np.random.default_rng(0)
    grid = np.moveaxis(np.indices((16, 16, 16)), 0, -1)
    centres, radii = random.uniform(5, 11, (4, 3)), (3, 4, 5, 3.5)
    mask = np.stack([np.linalg.norm(grid - c, axis=-1) <= r for c, r in zip(centres, radii, strict=True)])
    image = np.where(mask, 0, -800) + random.normal(0, 60, mask.shape)
    hu, target = tf.constant(image[..., None], tf.float32), tf.constant(mask[..., None], tf.uint8)
    model, loss = build_unet(TINY), Loss(LossConfig(name="dice_bce"))
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step() -> None:
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(loss(model(hu, training=True), target))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)

    for _ in range(60):
        step()
    predicted = model(hu, training=False).numpy()[..., 0] > 0
    assert 2 * (predicted & mask).sum() / (predicted.sum() + mask.sum()) > 0.9


@pytest.mark.slow
def test_the_exported_file_gives_the_networks_probabilities_in_another_process(tmp_path: Path) -> None:
    networks = {}
    pair = TINY.model_copy(update={"members": 2})
    cases = {"alone": ("float32", TINY), "half": ("mixed_bfloat16", TINY), "ensemble": ("float32", pair)}
    for name, (policy, config) in cases.items():
        keras.mixed_precision.set_dtype_policy(policy)
        model = networks[name] = build_unet(config)
        for variable in model.trainable_variables:  # new biases are all alike: make each its own
            variable.assign_add(np.random.default_rng(1).normal(0, 0.1, variable.shape).astype(np.float32))
        (tmp_path / f"{name}.keras").write_bytes(export_model(arrays(model.weights), config))
        assert keras.mixed_precision.dtype_policy().name == policy
    np.save(tmp_path / "hu.npy", volume_hu())
    # As a user would, who has lungseg installed for the one layer that is its own.
    script = (
        "import sys, keras, numpy as np, lungseg.model.unet\n"
        "for name in sys.argv[1:]:\n"
        "    np.save(name, keras.saving.load_model(name + '.keras')(np.load('hu.npy')))\n"
    )
    command = [sys.executable, "-c", script, *networks]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    keras.mixed_precision.set_dtype_policy("float32")
    for name, model in networks.items():
        config = cases[name][1]
        same = build_unet(config)
        same.set_weights(model.get_weights())
        members = by_member(same(volume_hu()), config)
        expected = np.mean([tf.sigmoid(outputs[0]) for outputs in members], axis=0)
        probability = np.load(tmp_path / f"{name}.npy")
        assert probability.dtype == np.float32
        assert expected.std() > 1e-3
        np.testing.assert_allclose(probability, expected, atol=1e-5)
