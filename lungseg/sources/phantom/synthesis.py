"""One synthetic CT: the chest, what runs through it, what is mistaken for nodules, nodules, the scanner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from lungseg.sources.phantom.anatomy import BLOOD_HU, Chest, Lesion, Window, whole
from lungseg.sources.phantom.branches import Tree, Tube, airways, stamp_tube, vessels
from lungseg.sources.phantom.decoys import distract, mislead
from lungseg.sources.phantom.scanner import noisy, reconstructed

LUMEN_HU = -960.0
FED = 0.5
"""Share of the lesions of a hard phantom in which a vessel ends."""
KERNEL_PIXELS = 8


class Phantom:
    """A chest of which any part can be seen; what runs through its lungs is drawn once. A function of `seed`.

    In a `hard` one lesions hang on the wall and on vessels, scars, bands and lymph nodes are there beside
    them, and the kernel differs from scan to scan.
    """

    def __init__(
        self,
        shape_zyx: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        lesions: Sequence[Lesion],
        seed: Sequence[int],
        hard: bool = False,
    ) -> None:
        self.shape_zyx, self.spacing_mm = shape_zyx, spacing_mm
        self.lesions, self.seed, self.hard = lesions, seed, hard
        chest, rng = self._chest(whole(shape_zyx))
        fed = chest.lesions_mm[rng.uniform(size=len(lesions)) < FED] if hard else chest.lesions_mm[:0]
        self.vessels = Tree(vessels(chest.hila_mm, chest.points_in_lung, rng, fed))
        self.airways = Tree(airways(chest.carina_mm, chest.hila_mm, chest.points_in_lung, rng))
        self.drawn = rng.bit_generator.state

    def image(self, window: Window | None = None) -> np.ndarray:
        """int16 HU [z, y, x], slices from the feet to the head, rows to the back. With a `window` only that
        part is made, in a small part of the time: what the whole would show there, but for the noise."""
        wide = _widened(window, self.shape_zyx) if window else whole(self.shape_zyx)
        chest, rng = self._chest(wide)
        rng.bit_generator.state = self.drawn
        hu = np.empty([side.stop - side.start for side in wide], np.float32)
        for index, plane in enumerate(hu):
            plane[...] = chest.slice_hu(index)
        for tube in self.vessels.near(hu, chest):
            stamp_tube(hu, chest, tube, BLOOD_HU + 10)
        for tube in self.airways.near(hu, chest):
            _stamp_airway(hu, chest, tube)
        distract(hu, chest, rng)
        if self.hard:
            mislead(hu, chest, rng)
        origin = np.array([side.start for side in wide])
        for lesion in self.lesions:
            _paint(hu, lesion, origin, rng)
        seen = reconstructed(hu, self.spacing_mm, rng) if self.hard else noisy(hu, rng)
        return seen[
            tuple(slice(s.start - o, s.stop - o) for s, o in zip(window or wide, origin, strict=True))
        ]

    def _chest(self, window: Window) -> tuple[Chest, np.random.Generator]:
        rng = np.random.default_rng(self.seed)
        return Chest(self.shape_zyx, self.spacing_mm, self.lesions, rng, self.hard, window), rng


def _widened(window: Window, shape_zyx: tuple[int, int, int]) -> Window:
    """By what a kernel reaches in the plane, since it takes an image as a period of an endless one."""
    slices, *plane = window
    rows, columns = (
        slice(max(side.start - KERNEL_PIXELS, 0), min(side.stop + KERNEL_PIXELS, count))
        for side, count in zip(plane, shape_zyx[1:], strict=True)
    )
    return slices, rows, columns


def _stamp_airway(hu: np.ndarray, chest: Chest, tube: Tube) -> None:
    wall_mm = 0.5 + 0.15 * tube.radius
    stamp_tube(hu, chest, tube.widened(wall_mm), 0.0)
    stamp_tube(hu, chest, tube, LUMEN_HU)


def _paint(hu: np.ndarray, lesion: Lesion, origin: np.ndarray, rng: np.random.Generator) -> None:
    """Blend a lesion into `hu`, whose first voxel is at `origin`, in place: its mask is where it fills at
    least half of a voxel."""
    pad = 3
    mask = np.pad(lesion.mask, pad).astype(np.float32)
    share = gaussian_filter(mask, (0.35, 0.8, 0.8))
    solid, ground_glass = rng.uniform(0, 60), rng.uniform(-650, -400)
    grain = 15 * gaussian_filter(rng.standard_normal(mask.shape), 1.0) * 3
    if lesion.texture >= 4:
        inner = solid + grain
    elif lesion.texture < 2.5:
        inner = ground_glass + 2 * grain
    else:
        core = np.clip(4 * gaussian_filter(mask, (1.0, 3.0, 3.0)) - 2.4, 0, 1)
        inner = ground_glass + core * (solid - ground_glass) + grain
    # The padding, or all of it, may reach beyond the part that is made.
    first = np.array(lesion.corner_zyx) - origin - pad
    low, high = np.maximum(first, 0), np.minimum(first + mask.shape, hu.shape)
    if (high <= low).any():
        return
    there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    here = tuple(slice(a, b) for a, b in zip(low - first, high - first, strict=True))
    part = hu[there]
    np.maximum(part, part + share[here] * (inner[here] - part), out=part)
