"""One contestant of `step.py` in a process of its own: prints the seconds of each of its training steps.

    python step_contestants.py lungseg|torch|peak SIDE BATCH WIDTH DEPTH REPLICAS float32|bfloat16 STEPS

Run by the interpreter that has the contestant's framework. Both train the same plain U-Net (DEPTH levels,
WIDTH channels at the first and twice as many at each next, strided convolutions down, instance norm, leaky
ReLU) on Dice and cross-entropy with AdamW and clipped gradients, without augmentation, on two threads,
lungseg in so many replicas.
"peak" is one convolution. All take the GPU that they see, if there is one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np

THREADS = 2
MAX_WIDTH = 320
PLAIN = (
    "augment.flips=false", "augment.turns=false", "augment.warp_share=0", "augment.noise_hu=0",
    "augment.blur_share=0", "augment.brightness_hu=0", "augment.contrast=0", "augment.gamma=0",
)  # fmt: skip


def patches(side: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU and a uint8 mask of a ball each."""
    random = np.random.default_rng(0)
    grid = np.indices((side,) * 3) - side / 2
    mask = np.repeat((np.square(grid).sum(0) < (side / 8) ** 2)[None], batch, 0).astype(np.uint8)
    return (np.where(mask, 0, -800) + random.normal(0, 60, mask.shape)).astype(np.int16), mask


def lungseg(
    side: int, batch: int, width: int, depth: int, replicas: int, precision: str
) -> Callable[[], float]:
    import lungseg  # noqa: F401, I001 - first: it has TensorFlow compute by oneDNN on every CPU
    import tensorflow as tf

    from lungseg.config import load_recipe
    from lungseg.model.precision import set_precision
    from lungseg.stream.patch_stream import Batch
    from lungseg.train.step import Stepper
    from lungseg.train.strategy import make_strategy

    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision]
    recipe = load_recipe(None, [
        f"model.width={width}", f"model.depth={depth}", "model.downsampling=stride",
        f"train.global_batch={batch}", f"train.precision={policy}", *PLAIN,
        f"train.logical_cpu_devices={replicas}",
        f"train.gpus_per_worker={len(tf.config.list_physical_devices('GPU'))}",
    ])  # fmt: skip
    strategy = make_strategy(recipe, 1, THREADS)
    set_precision(recipe.train)
    stepper = Stepper(recipe, strategy, 1000)
    image_hu, mask = patches(side, batch)
    return lambda: float(stepper.train(stepper.distribute(Batch(0, 0, image_hu, mask))).loss)


def torch(
    side: int, batch: int, width: int, depth: int, replicas: int, precision: str
) -> Callable[[], float]:
    import torch
    from monai.losses import DiceCELoss
    from monai.networks.nets import DynUNet

    torch.set_num_threads(THREADS)
    filters = levels(width, depth)
    strides = [1] + [2] * (depth - 1)
    norm = ("INSTANCE", {"affine": True})
    network = DynUNet(3, 1, 1, [3] * depth, strides, strides[1:], filters=filters, norm_name=norm)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device, memory_format=torch.channels_last_3d)
    optimizer, loss_of = torch.optim.AdamW(network.parameters(), 1e-3), DiceCELoss(sigmoid=True)
    image_hu, mask = patches(side, batch)

    def step() -> float:
        hu = torch.from_numpy(image_hu)[:, None].float().to(device, memory_format=torch.channels_last_3d)
        target = torch.from_numpy(mask)[:, None].float().to(device)
        windowed = ((hu + 1000) / 700 - 1).clamp(-1, 1)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = network(windowed)
        loss = loss_of(logits.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        return float(loss)

    return step


def peak(side: int, batch: int, width: int, depth: int, replicas: int, precision: str) -> Callable[[], float]:
    """A convolution of 32 to 32 channels, which these kernels like best."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    shape, kernel = (batch, side // 2, side // 2, side // 2, 32), (3, 3, 3, 32, 32)
    features, weights = (tf.cast(tf.random.normal(s), precision) for s in (shape, kernel))
    convolve = tf.function(
        lambda: tf.reduce_sum(tf.nn.conv3d(features, weights, [1] * 5, "SAME")[0, 0, 0, 0])
    )
    return lambda: float(convolve())


def levels(width: int, depth: int) -> list[int]:
    """Channels of each level, as both build them."""
    return [min(width * 2**level, MAX_WIDTH) for level in range(depth)]


def flops(side: int, batch: int, width: int, depth: int) -> int:
    """Multiplications and additions of one step's convolutions: forward, and twice as many backward."""
    voxels = [batch * (side // 2**level) ** 3 for level in range(depth)]
    widths, total = levels(width, depth), 0
    for level, (count, channels) in enumerate(zip(voxels, widths, strict=True)):
        into = widths[level - 1] if level else 1
        total += 27 * count * (into * channels + channels * channels)
        if level < depth - 1:
            total += 27 * count * (2 * channels * channels + channels * channels)  # the decoder's two
            total += count * channels * widths[level + 1]  # up: each voxel is written once
    return 3 * 2 * (total + voxels[0] * width)


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    name, *contest, precision, steps = sys.argv[1:]
    step = {"lungseg": lungseg, "torch": torch, "peak": peak}[name](*map(int, contest), precision)
    for _ in range(3):
        step()
    seconds = []
    for _ in range(int(steps)):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
