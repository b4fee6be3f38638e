"""Sliding-window inference: a whole scan through a network that sees one window at a time."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from lungseg.config import SegmentConfig
from lungseg.errors import ConfigError, RunError
from lungseg.scan.volume import AIR_HU, bounding_box

CONTEXT_VOXELS = 16  # around the lungs' box, for what grows on the pleura
IN_FLIGHT = 2
"""Calls of the network at a time: some operations keep a single core busy, and two calls fill both."""
Box = tuple[slice, ...]
Predictor = Callable[[np.ndarray], np.ndarray]
"""float32 HU [n, z, y, x, 1] -> float32 probability [n, z, y, x, 1]"""


def predict_volume(
    predict: Predictor,
    volume_hu: np.ndarray,
    config: SegmentConfig,
    *,
    lungs: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    multiple: int = 16,
) -> np.ndarray:
    """Probability float32 [z, y, x] of `volume_hu` (int16 [z, y, x]), averaged over overlapping windows.

    Windows are weighted by a Gaussian, since predictions near a window's border lack context (Isensee et
    al., nnU-Net, Nature Methods 2021). A window is never larger than the volume rounded down to `multiple`,
    the network's total stride, so that only a volume thinner than that is filled with air: instance norm
    takes its statistics of the whole window, and air that no training patch had shifts them. Every call of
    `predict` has the same shape, `config.batch` windows, so that a graph is traced once.

    With `lungs` (nonzero inside, same grid) and `config.lungs_only`, only the lungs' box and some context
    around it is tiled, and windows without a lung voxel are not predicted: voxels that lie in no window get
    probability 0.
    `progress` is called with (windows done, windows in all).
    Raises ConfigError("window-indivisible") and RunError("prediction-not-finite").
    """
    if any(side % multiple for side in config.window_zyx):
        raise ConfigError(
            "window-indivisible",
            window_zyx=config.window_zyx,
            remedy=f"make every side of segment.window_zyx a multiple of {multiple}, the network's stride",
        )
    if config.mirror:
        predict = mirrored(predict)
    if lungs is None or not config.lungs_only:
        return _tile(predict, volume_hu, config, None, progress, multiple)
    total = np.zeros(volume_hu.shape, np.float32)
    box = _around(lungs)
    if box:
        total[box] = _tile(predict, volume_hu[box], config, lungs[box], progress, multiple)
    return total


def mirrored(predict: Predictor) -> Predictor:
    """The mean of what `predict` gives for the eight mirror images of a window, each mirrored back."""
    sides = [slice(None), slice(None, None, -1)]
    images = [(slice(None), *along, slice(None)) for along in itertools.product(sides, repeat=3)]

    def mean(windows: np.ndarray) -> np.ndarray:
        total = np.zeros(windows.shape, np.float32)
        for image in images:
            total += np.asarray(predict(np.ascontiguousarray(windows[image])))[image]
        return total / len(images)

    return mean


def _around(lungs: np.ndarray) -> tuple[slice, ...]:
    """The box of the lungs and CONTEXT_VOXELS more on each side; empty without lungs."""
    return tuple(
        slice(max(0, side.start - CONTEXT_VOXELS), side.stop + CONTEXT_VOXELS) for side in bounding_box(lungs)
    )


def _tile(
    predict: Predictor,
    volume_hu: np.ndarray,
    config: SegmentConfig,
    lungs: np.ndarray | None,
    progress: Callable[[int, int], None] | None,
    multiple: int,
) -> np.ndarray:
    shape = volume_hu.shape
    window = tuple(
        min(side, max(1, size // multiple) * multiple)
        for side, size in zip(config.window_zyx, shape, strict=True)
    )
    margins = [
        (lack // 2, lack - lack // 2) for lack in (max(0, w - s) for w, s in zip(window, shape, strict=True))
    ]
    padded = np.pad(volume_hu, margins, constant_values=AIR_HU)
    boxes = _windows(padded.shape, window, config.overlap)
    if lungs is not None:
        inside = np.pad(lungs, margins)
        boxes = [box for box in boxes if inside[box].any()]

    importance = _gaussian(window)
    total = np.zeros(padded.shape, np.float32)
    weight = np.zeros(padded.shape, np.float32)
    done = 0
    chunks = [boxes[start : start + config.batch] for start in range(0, len(boxes), config.batch)]
    for chunk, probability in _predicted(predict, padded, chunks, (config.batch, *window, 1)):
        if not np.isfinite(probability).all():
            raise RunError("prediction-not-finite", remedy="the weights are broken: use another checkpoint")
        for one, box in zip(probability, chunk, strict=True):
            total[box] += one * importance
            weight[box] += importance
        done += len(chunk)
        if progress is not None:
            progress(done, len(boxes))

    np.divide(total, weight, out=total, where=weight > 0)
    return total[tuple(slice(low, low + size) for (low, _), size in zip(margins, shape, strict=True))]


def _predicted(
    predict: Predictor, padded: np.ndarray, chunks: Sequence[list[Box]], shape: tuple[int, ...]
) -> Iterator[tuple[list[Box], np.ndarray]]:
    """Each chunk of boxes with its windows' probabilities [n, z, y, x], in order. The network is at the next
    IN_FLIGHT chunks meanwhile."""

    def ask(chunk: list[Box]) -> np.ndarray:
        windows = np.full(shape, AIR_HU, np.float32)
        for row, box in enumerate(chunk):
            windows[row, ..., 0] = padded[box]
        return np.asarray(predict(windows))[: len(chunk), ..., 0]

    with ThreadPoolExecutor(IN_FLIGHT) as network:
        asked = deque(network.submit(ask, chunk) for chunk in chunks[:1])
        wait(asked)  # on its own: the first call builds what the others use, and is soon seen as progress
        asked.extend(network.submit(ask, chunk) for chunk in chunks[1:IN_FLIGHT])
        for chunk, later in itertools.zip_longest(chunks, chunks[IN_FLIGHT:]):
            probability = asked.popleft().result()
            if later:
                asked.append(network.submit(ask, later))
            yield chunk, probability


def _windows(shape: tuple[int, ...], window: tuple[int, ...], overlap: float) -> list[tuple[slice, ...]]:
    """Evenly spread windows that cover `shape`, neighbours overlapping by at least `overlap` of a side."""
    starts = []
    for size, side in zip(shape, window, strict=True):
        step = max(1, math.floor(side * (1 - overlap)))
        count = math.ceil((size - side) / step) + 1
        starts.append(np.linspace(0, size - side, count).round().astype(int).tolist())
    return [
        tuple(slice(low, low + side) for low, side in zip(corner, window, strict=True))
        for corner in itertools.product(*starts)
    ]


def _gaussian(window: tuple[int, ...]) -> np.ndarray:
    """float32 importance of a window's voxels: 1 at the centre, sigma 1/8 of each side (nnU-Net's choice).

    At a corner it is exp(-24), far above float32's smallest number, so no voxel has weight 0.
    """
    importance = np.ones((1, 1, 1))
    for axis, side in enumerate(window):
        offset = (np.arange(side) - (side - 1) / 2) / (side / 8)
        importance = importance * np.exp(-0.5 * offset**2).reshape([-1 if a == axis else 1 for a in range(3)])
    return importance.astype(np.float32)
