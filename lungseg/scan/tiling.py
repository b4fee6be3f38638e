"""Windows that cover a volume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

Sides = tuple[int, ...]
"""Voxels along (z, y, x)."""


def fitting(window: Sequence[int], shape: Sequence[int], multiple: int) -> Sides:
    """`window`, no larger than a volume of `shape` rounded down to `multiple`, a network's total stride."""
    return tuple(
        min(side, max(1, size // multiple) * multiple) for side, size in zip(window, shape, strict=True)
    )


def tiles(
    shape: Sequence[int], window: Sequence[int], least: Sequence[int], multiple: int, overlap: float
) -> tuple[Sides, list[tuple[int, ...]]]:
    """The sides of the windows that cover a volume of `shape`, and where each begins.

    They are spread evenly, neighbours overlapping by at least `overlap` of a side, and there are as few as
    of `window`. But each is as small as that allows, down to `least` (all of these sides are multiples of
    `multiple`): windows that end beyond the volume are moved back into it, to see again what their
    neighbours do.
    None is larger than the volume rounded down to `multiple`, so that only a volume thinner than that must
    be filled up.
    """
    sides, starts = [], []
    for size, most, low in zip(shape, fitting(window, shape, multiple), least, strict=True):
        count = _count(size, most, overlap)
        allowed = range(min(low, most), most + 1, multiple)
        side = next(side for side in allowed if _count(size, side, overlap) == count)
        sides.append(side)
        starts.append(np.linspace(0, max(0, size - side), count).round().astype(int).tolist())
    return tuple(sides), list(itertools.product(*starts))


def _count(size: int, side: int, overlap: float) -> int:
    """Windows of `side` that cover `size` voxels."""
    step = max(1, math.floor(side * (1 - overlap)))
    return max(0, math.ceil((size - side) / step)) + 1
