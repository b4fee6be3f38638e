"""Vessels and airways of a synthetic lung: trees of tapering tubes, and how they enter a volume.

Positions are mm (z, y, x) in the frame of `lungseg.sources.phantom.anatomy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

# points(count, depth_mm, side, rng): random points [count, 3] that deep in the lung of one side
LungPoints = Callable[[int, float, int, np.random.Generator], np.ndarray]
# Prefers a short way to the root over short branches (Cuntz et al., 2010, "balancing factor").
BALANCE = 0.35
# r_parent^k = sum of r_child^k; 3 is Murray's law, lungs are a little below.
BRANCHING_EXPONENT = 2.7
FED_RADIUS = 1.2
NOWHERE = np.empty((0, 3))


class Frame(Protocol):
    """Where index (z, y, x) lies: (index - axis_index) * spacing_mm."""

    spacing_mm: np.ndarray
    axis_index: np.ndarray


@dataclass(frozen=True)
class Tube:
    start_mm: np.ndarray
    end_mm: np.ndarray
    radius: float
    end_radius: float

    def widened(self, by_mm: float) -> Tube:
        return replace(self, radius=self.radius + by_mm, end_radius=self.end_radius + by_mm)


class Tree:
    """Thousands of tubes, of which a part of a chest holds few."""

    def __init__(self, tubes: Iterable[Tube]) -> None:
        self.tubes = list(tubes)
        ends = np.array([(tube.start_mm, tube.end_mm) for tube in self.tubes])
        reach = np.array([tube.radius for tube in self.tubes])[:, None] + 5
        self.low_mm, self.high_mm = ends.min(axis=1) - reach, ends.max(axis=1) + reach

    def near(self, hu: np.ndarray, frame: Frame) -> Iterator[Tube]:
        """Those that may reach into `hu`, be they a few mm wider."""
        first = self.low_mm / frame.spacing_mm + frame.axis_index
        last = self.high_mm / frame.spacing_mm + frame.axis_index
        inside = ((last > -2) & (first < np.array(hu.shape) + 2)).all(axis=1)
        return (self.tubes[index] for index in np.flatnonzero(inside))


def vessels(
    hila_mm: tuple[np.ndarray, np.ndarray], points: LungPoints, rng: np.random.Generator, fed_mm: np.ndarray
) -> Iterator[Tube]:
    """Arteries and veins of both lungs, from the hilum to 4 mm below the pleura; arteries go to `fed_mm`
    [n, 3] besides, on the side where each lies, and are as wide there as one sees."""
    for side, hilum in zip((-1, 1), hila_mm, strict=True):
        its = fed_mm[np.sign(fed_mm[:, 2]) == side]
        for offset in (-6.0, 6.0):
            ends = points(900, 4.0, side, rng)
            yield from _tree(hilum + np.array([0, offset, 0]), ends, 0.45, rng, its)
            its = its[:0]


def airways(
    carina_mm: np.ndarray,
    hila_mm: tuple[np.ndarray, np.ndarray],
    points: LungPoints,
    rng: np.random.Generator,
) -> Iterator[Tube]:
    """The lumen of trachea, main bronchi and the bronchi that a CT resolves."""
    yield Tube(carina_mm, carina_mm + np.array([300, 0, 0]), 8.5, 8.5)
    for side, hilum in zip((-1, 1), hila_mm, strict=True):
        yield Tube(carina_mm, hilum, 6.5, 5.0)
        yield from _tree(hilum, points(90, 12.0, side, rng), 0.7, rng)


def _tree(
    root: np.ndarray,
    ends: np.ndarray,
    end_radius: float,
    rng: np.random.Generator,
    fed: np.ndarray = NOWHERE,
) -> Iterator[Tube]:
    """Join `ends` [n, 3] to `root`, nearest first, each where the way to the root stays short; `fed` [m, 3]
    likewise, where a tube is FED_RADIUS wide."""
    ends, radii = np.vstack([ends, fed]), np.repeat([end_radius, FED_RADIUS], [len(ends), len(fed)])
    order = np.argsort(np.linalg.norm(ends - root, axis=1))
    nodes, radii = np.vstack([root, ends[order]]), np.append(end_radius, radii[order])
    parents = np.zeros(len(nodes), int)
    way = np.zeros(len(nodes))
    for index in range(1, len(nodes)):
        steps = np.linalg.norm(nodes[:index] - nodes[index], axis=1)
        parents[index] = parent = int(np.argmin(steps + BALANCE * way[:index]))
        way[index] = way[parent] + steps[parent]
    load = np.zeros(len(nodes))
    for index in range(len(nodes) - 1, 0, -1):  # children come after their parents
        load[index] = max(load[index], radii[index] ** BRANCHING_EXPONENT)
        load[parents[index]] += load[index]
    radii = load ** (1 / BRANCHING_EXPONENT)
    for index in range(1, len(nodes)):
        start, end = nodes[parents[index]], nodes[index]
        bend = (start + end) / 2 + rng.normal(0, 0.06 * np.linalg.norm(end - start), 3)
        yield Tube(start, bend, radii[index], radii[index])
        yield Tube(bend, end, radii[index], max(0.8 * radii[index], end_radius))


def stamp_tube(hu: np.ndarray, frame: Frame, tube: Tube, inner_hu: float) -> None:
    """Draw a tube with round ends into `hu` [z, y, x], in place."""
    axis = tube.end_mm - tube.start_mm
    low, high = np.minimum(tube.start_mm, tube.end_mm), np.maximum(tube.start_mm, tube.end_mm)
    box, places = _places(hu, frame, low - tube.radius, high + tube.radius)
    if not places:
        return
    offsets = [place - start for place, start in zip(places, tube.start_mm, strict=True)]
    along = sum(offset * step for offset, step in zip(offsets, axis, strict=True))
    along = np.clip(along / max(float(axis @ axis), 1e-6), 0, 1)
    squares = sum((offset - along * step) ** 2 for offset, step in zip(offsets, axis, strict=True))
    radius = tube.radius + along * (tube.end_radius - tube.radius)
    _blend(hu[box], radius - np.sqrt(squares), frame, inner_hu)


def stamp_ellipsoid(
    hu: np.ndarray, frame: Frame, centre_mm: np.ndarray, axes: np.ndarray, radii: np.ndarray, inner_hu: float
) -> None:
    """Draw an ellipsoid with `radii` along the rows of the orthonormal `axes`, in place."""
    reach = np.abs(axes.T) @ radii
    box, places = _places(hu, frame, centre_mm - reach, centre_mm + reach)
    if not places:
        return
    offsets = [place - middle for place, middle in zip(places, centre_mm, strict=True)]
    along = [sum(o * a for o, a in zip(offsets, axis, strict=True)) for axis in axes]
    rho = np.sqrt(sum((part / radius) ** 2 for part, radius in zip(along, radii, strict=True)))
    _blend(hu[box], (1 - rho) * radii.min(), frame, inner_hu)


def _places(
    hu: np.ndarray, frame: Frame, low_mm: np.ndarray, high_mm: np.ndarray
) -> tuple[tuple[slice, ...], list[np.ndarray]]:
    """The part of `hu` around a box, and its positions: z [z, s, 1, 1], y [1, 1, y, 1], x [1, 1, 1, x].

    A slice is sampled at several heights s about 1 mm apart, since it shows the mean over its thickness.
    """
    first = np.maximum(np.floor(low_mm / frame.spacing_mm + frame.axis_index).astype(int) - 1, 0)
    last = np.minimum(np.ceil(high_mm / frame.spacing_mm + frame.axis_index).astype(int) + 2, hu.shape)
    box = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    if (last <= first).any():
        return box, []
    z, y, x = (
        ((np.arange(a, b) - middle) * step).astype(np.float32)
        for a, b, middle, step in zip(first, last, frame.axis_index, frame.spacing_mm, strict=True)
    )
    samples = max(1, round(frame.spacing_mm[0]))
    heights = ((np.arange(samples) + 0.5) / samples - 0.5).astype(np.float32) * frame.spacing_mm[0]
    return box, [(z[:, None] + heights)[:, :, None, None], y[:, None], x]


def _blend(part: np.ndarray, depth_mm: np.ndarray, frame: Frame, inner_hu: float) -> None:
    """Mix by how much of each voxel lies inside; tissue only brightens, air only darkens."""
    share = np.clip(0.5 + depth_mm / frame.spacing_mm[2], 0, 1).mean(axis=1)
    mixed = part + share * (inner_hu - part)
    (np.maximum if inner_hu > -500 else np.minimum)(part, mixed, out=part)
