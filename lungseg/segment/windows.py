"""Windows of a scan: the network is asked about several at a time, and what it says of each is averaged."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import numpy as np

from lungseg.errors import RunError

IN_FLIGHT = 2
"""Calls of the network at a time: some operations keep a single core busy, and two calls fill both."""
MIRROR_IMAGES = tuple(itertools.product([1, -1], repeat=3))
"""Steps along (z, y, x): of the eight the first is the window as it is."""
HALF_TURNS = tuple(image for image in MIRROR_IMAGES if np.prod(image) == 1)
"""The window as it is and turned by 180 degrees about each axis: what no mirror is needed for."""
Box = tuple[slice, ...]
Predictor = Callable[[np.ndarray], np.ndarray]
"""float32 HU [n, z, y, x, 1] -> float32 probability [n, z, y, x, 1]"""
T = TypeVar("T")


class WeightedMean:
    """The mean of what windows say of a volume of `shape_zyx`.

    Each is weighted by a Gaussian of a sigma of 1/8 of its sides, since predictions near a window's border
    lack context (Isensee et al., nnU-Net, Nature Methods 2021).
    """

    def __init__(self, shape_zyx: Sequence[int]) -> None:
        self._total = np.zeros(shape_zyx, np.float32)
        self._weight = np.zeros(shape_zyx, np.float32)

    def add(self, box: Box, probability: np.ndarray) -> None:
        """float [z, y, x] of the window at `box`. Raises RunError("prediction-not-finite")."""
        if not np.isfinite(probability).all():
            raise RunError("prediction-not-finite", remedy="the weights are broken: use another checkpoint")
        importance = _gaussian(probability.shape)
        self._total[box] += probability * importance
        self._weight[box] += importance

    def value(self) -> np.ndarray:
        """float32 [z, y, x], 0 where no window lay."""
        return np.divide(self._total, self._weight, out=np.zeros_like(self._total), where=self._weight > 0)


@lru_cache(maxsize=4)  # a scan has two shapes of windows
def _gaussian(window: tuple[int, ...]) -> np.ndarray:
    """float32 importance of a window's voxels: 1 at the centre, sigma 1/8 of each side (nnU-Net's choice).

    At a corner it is exp(-24), far above float32's smallest number, so no voxel has weight 0.
    """
    importance = np.ones((1, 1, 1))
    for axis, side in enumerate(window):
        offset = (np.arange(side) - (side - 1) / 2) / (side / 8)
        importance = importance * np.exp(-0.5 * offset**2).reshape([-1 if a == axis else 1 for a in range(3)])
    return importance.astype(np.float32)


def mean_of(predict: Predictor, images: Sequence[tuple[int, ...]]) -> Predictor:
    """The mean of what `predict` gives for `images` of a window (see MIRROR_IMAGES), each brought back."""

    def mean(windows: np.ndarray) -> np.ndarray:
        total = np.zeros(windows.shape, np.float32)
        for steps in images:
            image = (slice(None), *(slice(None, None, step) for step in steps), slice(None))
            total += np.asarray(predict(np.ascontiguousarray(windows[image])))[image]
        return total / len(images)

    return mean


def in_flight(ask: Callable[[T], np.ndarray], asked: Sequence[T]) -> Iterator[tuple[T, np.ndarray]]:
    """Each of `asked` with its answer, in order. The network is at the next IN_FLIGHT meanwhile."""
    with ThreadPoolExecutor(IN_FLIGHT) as network:
        answers = deque(network.submit(ask, one) for one in asked[:1])
        wait(answers)  # on its own: the first call builds what the others use, and is soon seen as progress
        answers.extend(network.submit(ask, one) for one in asked[1:IN_FLIGHT])
        for one, later in itertools.zip_longest(asked, asked[IN_FLIGHT:]):
            answer = answers.popleft().result()
            if later is not None:
                answers.append(network.submit(ask, later))
            yield one, answer
