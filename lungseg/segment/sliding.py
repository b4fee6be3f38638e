"""Sliding-window inference: a whole scan through a network that sees one window at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lungseg.config import Recipe
from lungseg.errors import ConfigError
from lungseg.scan.tiling import tiles
from lungseg.scan.volume import AIR_HU, bounding_box
from lungseg.segment.second_look import look_again
from lungseg.segment.windows import MIRROR_IMAGES, Box, Predictor, WeightedMean, in_flight, mean_of

CONTEXT_VOXELS = 16  # around the lungs' box, for what grows on the pleura


def predict_volume(
    predict: Predictor,
    volume_hu: np.ndarray,
    recipe: Recipe,
    *,
    lungs: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Probability float32 [z, y, x] of `volume_hu` (int16 [z, y, x]): the weighted mean of overlapping
    windows, and of a second look at what these found.

    `volume_hu` is on the grid of `recipe.data.spacing_mm`. Every call of `predict` has the same shape,
    `segment.batch` windows (see `tiles`); those of the second look have another. Only a volume thinner than
    the network's total stride is filled with air: instance norm takes its statistics of the whole window,
    and air that no training patch had shifts them.

    With `lungs` (nonzero inside, same grid) and `segment.lungs_only`, only the lungs' box and some context
    around it is tiled, and windows without a lung voxel are not predicted: voxels that lie in no window get
    probability 0.
    `progress` is called with (windows done, windows in all), the second look not counted.
    Raises ConfigError("window-indivisible") and RunError("prediction-not-finite").
    """
    segment, stride = recipe.segment, recipe.model.total_stride
    if any(side % stride for side in segment.window_zyx):
        raise ConfigError(
            "window-indivisible",
            window_zyx=segment.window_zyx,
            remedy=f"make every side of segment.window_zyx a multiple of {stride}, the network's stride",
        )
    if lungs is None or not segment.lungs_only:
        return _tile(predict, volume_hu, recipe, None, progress)
    total = np.zeros(volume_hu.shape, np.float32)
    box = _around(lungs)
    if box:
        total[box] = _tile(predict, volume_hu[box], recipe, lungs[box], progress)
    return total


def _around(lungs: np.ndarray) -> Box:
    """The box of the lungs and CONTEXT_VOXELS more on each side; empty without lungs."""
    return tuple(
        slice(max(0, side.start - CONTEXT_VOXELS), side.stop + CONTEXT_VOXELS) for side in bounding_box(lungs)
    )


def _tile(
    predict: Predictor,
    volume_hu: np.ndarray,
    recipe: Recipe,
    lungs: np.ndarray | None,
    progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    segment, shape = recipe.segment, volume_hu.shape
    patch, stride = recipe.data.patch.shape_zyx, recipe.model.total_stride
    # None is smaller than the training patches: what a nodule looks like was learned with so much around it.
    window, corners = tiles(shape, segment.window_zyx, patch, stride, segment.overlap)
    margins = [
        (lack // 2, lack - lack // 2) for lack in (max(0, w - s) for w, s in zip(window, shape, strict=True))
    ]
    padded = np.pad(volume_hu, margins, constant_values=AIR_HU)
    inside = None if lungs is None else np.pad(lungs, margins)
    boxes = [tuple(map(slice, corner, np.add(corner, window).tolist())) for corner in corners]
    if inside is not None:
        boxes = [box for box in boxes if inside[box].any()]

    seen = mean_of(predict, MIRROR_IMAGES) if segment.mirror else predict

    def ask(chunk: list[Box]) -> np.ndarray:
        windows = np.full((segment.batch, *window, 1), AIR_HU, np.float32)
        for row, box in enumerate(chunk):
            windows[row, ..., 0] = padded[box]
        return np.asarray(seen(windows))[: len(chunk), ..., 0]

    mean, done = WeightedMean(padded.shape), 0
    chunks = [boxes[start : start + segment.batch] for start in range(0, len(boxes), segment.batch)]
    for chunk, probability in in_flight(ask, chunks):
        for box, one in zip(chunk, probability, strict=True):
            mean.add(box, one)
        done += len(chunk)
        if progress is not None:
            progress(done, len(boxes))
    look_again(predict, padded, mean, recipe, inside)
    return mean.value()[tuple(slice(low, low + size) for (low, _), size in zip(margins, shape, strict=True))]
