"""Which patches of a scan are trained on: a pure, seeded choice of centres, and the cut itself.

Most of a chest CT is easy. So around each nodule lie several jittered patches; of the rest, most
patches sit on bright voxels in the lungs (vessels, walls: what a model takes for a nodule), fewer
anywhere in the lungs, and a few outside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lungseg.config import PatchConfig

BRIGHT_HU = -500  # brighter than aerated lung, darker than any vessel, wall or solid nodule
TRIES_PER_SITE = 50
DRAWS = 50_000
STRATA = ("nodule", "hard", "lung", "outside")

Index = tuple[int, int, int]
Candidates = Callable[[np.ndarray | slice], np.ndarray]
"""Which voxels, given as flat indices, may be the centre of a patch: bool of as many."""


@dataclass(frozen=True)
class Site:
    """A patch by its centre; `stratum` is one of STRATA, `nodule_id` empty but for a nodule's."""

    centre_zyx: Index
    stratum: str
    nodule_id: str


def select_sites(
    mask: np.ndarray,
    lungs: np.ndarray,
    volume_hu: np.ndarray,
    nodules_zyx: Sequence[tuple[str, tuple[float, float, float]]],
    config: PatchConfig,
    seed: int,
) -> list[Site]:
    """The patches of one scan; the same arguments always give the same list.

    All arrays are [z, y, x] on one grid, `mask` nonzero in nodules and where to ignore; `nodules_zyx` are
    (id, centre as index). Each nodule gets `positives_per_nodule` patches that hold its centre, off the
    middle by at most `jitter` of half a patch. Negatives are voxels above -500 HU in the lungs ("hard"), any
    voxels of the lungs ("lung") and voxels above -500 HU outside them ("outside"); a patch that would touch a
    nodule or an ignore voxel is dropped. Where a scan has too little room there are fewer negatives, or none.

    Patches are moved to lie within the scan on each axis that is long enough; `cut` pads the others.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    size = np.array(config.shape_zyx)
    reach = np.floor(config.jitter * (size - 1) / 2).astype(int)
    taken = mask != 0
    sites = []
    for nodule_id, centre in nodules_zyx:
        middle = np.clip(np.rint(centre).astype(int), 0, np.array(mask.shape) - 1)
        taken[tuple(middle)] = True
        offsets = rng.integers(-reach, reach, (config.positives_per_nodule, 3), endpoint=True)
        sites += [Site(_inside(middle + offset, size, mask.shape), "nodule", nodule_id) for offset in offsets]

    lung, hu = lungs.ravel(), volume_hu.ravel()
    strata: tuple[tuple[str, Candidates, int], ...] = (
        ("hard", lambda at: (lung[at] != 0) & (hu[at] > BRIGHT_HU), config.hard_negatives_per_scan),
        ("lung", lambda at: lung[at] != 0, config.lung_negatives_per_scan),
        ("outside", lambda at: (lung[at] == 0) & (hu[at] > BRIGHT_HU), config.outside_per_scan),
    )
    for stratum, candidates, count in strata:
        centres = _negatives(candidates, taken, size, count, rng)
        sites += [Site(centre, stratum, "") for centre in centres]
    return sites


def cut(array: np.ndarray, centre_zyx: Index, shape_zyx: Index, fill: float) -> np.ndarray:
    """A copy of `shape_zyx` voxels of `array` [z, y, x], with `fill` beyond its borders.

    Voxel `shape // 2` of the patch is `centre_zyx`.
    """
    patch = np.full(shape_zyx, fill, array.dtype)
    first = np.subtract(centre_zyx, np.floor_divide(shape_zyx, 2))
    start = np.maximum(first, 0)
    stop = np.maximum(start, np.minimum(first + shape_zyx, array.shape))
    inside = tuple(slice(a, b) for a, b in zip(start - first, stop - first, strict=True))
    patch[inside] = array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    return patch


def _inside(centre: np.ndarray, size: np.ndarray, shape: tuple[int, ...]) -> Index:
    """`centre` moved as little as needed for its patch to lie in the scan, on axes that are long enough."""
    low, high = size // 2, np.array(shape) - (size - size // 2)
    z, y, x = (
        int(value) for value in np.where(low <= high, np.clip(centre, low, np.maximum(low, high)), centre)
    )
    return z, y, x


def _draw(candidates: Candidates, voxels: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `count` distinct voxels, as flat indices: all candidates are as likely.

    They are looked for among DRAWS voxels: to list the candidates of a whole scan takes longer than to
    resample it, and is only done where they are rare.
    """
    drawn = rng.integers(voxels, size=DRAWS)
    drawn = drawn[candidates(drawn)]
    found = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    if found.size < count:
        everywhere = np.flatnonzero(candidates(slice(None)))
        found = rng.choice(everywhere, min(everywhere.size, count), replace=False)
    return found[:count]


def _negatives(
    candidates: Candidates, taken: np.ndarray, size: np.ndarray, count: int, rng: np.random.Generator
) -> list[Index]:
    """Up to `count` distinct centres among `candidates` whose patches hold no voxel of `taken`."""
    tries = _draw(candidates, taken.size, count * TRIES_PER_SITE, rng)
    centres: dict[Index, None] = {}
    for voxel in np.stack(np.unravel_index(tries, taken.shape), axis=1):
        if len(centres) == count:
            break
        centre = _inside(voxel, size, taken.shape)
        first = np.array(centre) - size // 2
        box = tuple(slice(max(0, a), a + b) for a, b in zip(first, size, strict=True))
        if not taken[box].any():
            centres[centre] = None
    return list(centres)
