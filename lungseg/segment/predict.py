"""Segment a new scan: a mask on the scan's own grid, and its nodules in patient coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.config import Recipe, SegmentConfig
from lungseg.scan.lungs import lung_mask
from lungseg.scan.resample import resample, resample_onto
from lungseg.scan.volume import Geometry, Vector, Volume
from lungseg.segment.nodules import find_nodules
from lungseg.segment.quantify import NoduleMeasurement, Surface, quantify
from lungseg.segment.sliding import predict_volume
from lungseg.segment.windows import Predictor


@dataclass(frozen=True)
class Segmentation:
    """`labels` is int32 [z, y, x] on `geometry`, the input's own grid: 0 background, 1 the largest nodule.

    `probability` (float32) and `lungs` (uint8, None where none were found) are on `working`, the grid that
    the network saw. `surfaces` are those of `nodules`, in their order.
    """

    labels: np.ndarray
    geometry: Geometry
    nodules: tuple[NoduleMeasurement, ...]
    probability: np.ndarray
    working: Geometry
    config: SegmentConfig
    lungs: np.ndarray | None
    warnings: tuple[str, ...] = ()
    surfaces: tuple[Surface, ...] = ()


Asked = tuple[Predictor, Recipe]
"""A network, and the recipe that it was trained by."""
Grids = Mapping[Vector, tuple[Volume, np.ndarray | None]]
"""By spacing, a scan on that grid and its lungs (uint8, None where none were found)."""


def segment(
    predict: Predictor, volume: Volume, recipe: Recipe, progress: Callable[[int, int], None] | None = None
) -> Segmentation:
    """As `segment_by_mean`, by one network."""
    return segment_by_mean([(predict, recipe)], volume, progress)


def working_grids(volume: Volume, recipes: Iterable[Recipe]) -> Grids:
    """What the networks trained by `recipes` see of a scan."""
    return {spacing_mm: _on_grid(volume, spacing_mm) for spacing_mm in {r.data.spacing_mm for r in recipes}}


def segment_by_mean(
    networks: Sequence[Asked],
    volume: Volume,
    progress: Callable[[int, int], None] | None = None,
    grids: Grids | None = None,
) -> Segmentation:
    """Nodules of `volume` by the mean probability of several networks, which agree on what is made of it.

    Each network sees the scan at the spacing that it was trained at (`recipe.data.spacing_mm`), in its own
    windows. The mean is formed on the finest of these working grids, linearly interpolated where they differ.
    Nodules are its components there, as `evaluate` counts them; each of them is then taken to the scan's own
    grid, and measured, between voxels (see `quantify`). Where no lungs are found, the whole scan is searched;
    that, and values that are no HU, are warned of. `grids` are its `working_grids`, where they are there.
    """
    config = networks[0][1].segment
    grids = grids or working_grids(volume, [recipe for _, recipe in networks])
    working, lungs = grids[min(grids, key=fineness)]
    probability: np.ndarray | None = None
    for number, (predict, recipe) in enumerate(networks):
        seen, its_lungs = grids[recipe.data.spacing_mm]
        said = predict_volume(
            predict,
            seen.volume_hu,
            recipe,
            lungs=its_lungs,
            progress=_part_of(progress, number, len(networks)),
        )
        if seen is not working:
            said = resample_onto(said, seen.geometry, working.geometry)
        probability = said if probability is None else np.add(probability, said, out=probability)
    assert probability is not None  # there is a network
    probability /= len(networks)
    found, confidence = find_nodules(probability, working.geometry, config, lungs)
    labels, nodules, surfaces = quantify(
        found, probability, working.geometry, volume, config, lungs, confidence
    )
    warnings = [f"the values are probably no HU: {volume.not_hu}"] if volume.not_hu else []
    if lungs is None:
        warnings.append("no lungs were found, so the whole scan was searched: is it a chest CT?")
    return Segmentation(
        labels,
        volume.geometry,
        tuple(nodules),
        probability,
        working.geometry,
        config,
        lungs,
        tuple(warnings),
        tuple(surfaces),
    )


def fineness(spacing_mm: Vector) -> tuple[float, Vector]:
    """To sort working grids by, the finest first."""
    return math.prod(spacing_mm), spacing_mm


def _on_grid(volume: Volume, spacing_mm: Vector) -> tuple[Volume, np.ndarray | None]:
    working = resample(volume, spacing_mm)
    lungs = lung_mask(working)
    return working, lungs if lungs.any() else None


def _part_of(
    progress: Callable[[int, int], None] | None, number: int, count: int
) -> Callable[[int, int], None] | None:
    """That of all networks, each taken to have as many windows as this one."""
    return progress and (lambda done, total: progress(number * total + done, count * total))
