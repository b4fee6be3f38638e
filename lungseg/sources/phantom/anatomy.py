"""A synthetic chest in HU: body, bones, mediastinum and lungs, built around given lesions.

Nothing here is a patient. The chest exists so that a network has something to learn and a threshold has
something to fail on: vessels have the HU and the cross-section of nodules and many times their volume,
and only their shape in 3D tells them apart.

Positions are mm (z, y, x) from the chest's axis in the lowest slice: z to the head, y to the back, x to
the image's right. A "distance" is in mm, negative inside, and only near a surface exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

AIR_HU, FAT_HU, MUSCLE_HU, BLOOD_HU, LIVER_HU = -1000.0, -100.0, 50.0, 40.0, 60.0
LUNG_HU = -860.0
# Room for aerated lung around a lesion, so that even a pleural one can be told from the chest wall.
POCKET_MM = 6.0
# How far, in its radii, a pleural lesion of a hard phantom stands out of the wall that it hangs on.
STANDS_OUT = 0.35
EMPTY_BAYS = 6
OPENING = 0.7  # what a bay's radius gains over its way inwards
EDGE_MM = 1.0  # over which two tissues mix: the blur of a scanner
Window = tuple[slice, slice, slice]


def whole(shape_zyx: tuple[int, int, int]) -> Window:
    depth, height, width = shape_zyx
    return slice(0, depth), slice(0, height), slice(0, width)


@dataclass(frozen=True)
class Lesion:
    """`mask` is bool [z, y, x] with its first voxel at `corner_zyx`; `texture` runs from 1 (ground glass)
    to 5 (solid)."""

    corner_zyx: tuple[int, int, int]
    mask: np.ndarray
    texture: float


class _Plan(NamedTuple):
    """What the chest's shapes at some places (y, x) have in common at all heights; lengths in mm."""

    y: np.ndarray
    x: np.ndarray
    radius: np.ndarray  # from the chest's axis
    wall: np.ndarray  # the rib cage's reach in that direction
    diaphragm: np.ndarray  # its height
    spine: np.ndarray  # depth in it
    mediastinum: np.ndarray  # depth in it, where it is narrowest
    heart: np.ndarray  # squared, 1 at its surface on its own level


class Chest:
    """The shapes of one chest. Larger than usual if a lesion would else lie in its wall.

    Each lesion has aerated lung around it. In a `hard` one only what would lie in the wall is let in: lung
    reaches around its inner side, and it hangs on the wall by its outer one.

    With a `window` only those voxels are made, and `axis_index`, the indices of slices and the arrays are of
    that part; what is where is the same.
    """

    fissure_slope = 0.9

    def __init__(
        self,
        shape_zyx: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        lesions: Sequence[Lesion],
        rng: np.random.Generator,
        hard: bool = False,
        window: Window | None = None,
    ) -> None:
        self.spacing_mm = np.array(spacing_mm, np.float32)
        axis_index = np.array([0, shape_zyx[1] / 2, shape_zyx[2] / 2], np.float32)
        # Plain floats: with a float64 of NumPy every float32 slice would become float64.
        self.height = float(shape_zyx[0] * spacing_mm[0])
        width = float(shape_zyx[2] * spacing_mm[2]) * rng.uniform(0.97, 1.03)
        self.half_y, self.half_x = 0.26 * width, 0.38 * width
        corners = np.array([lesion.corner_zyx for lesion in lesions]).reshape(-1, 3)
        sizes = np.array([lesion.mask.shape for lesion in lesions]).reshape(-1, 3)
        middles = (corners + (sizes - 1) / 2 - axis_index) * self.spacing_mm
        self.lesions_mm = self.pockets_mm = middles.astype(np.float32)
        self.pocket_radii = (sizes * self.spacing_mm).max(axis=1).astype(np.float32) / 2 + POCKET_MM
        if hard:
            voxels = np.array([lesion.mask.sum() for lesion in lesions])
            self.pocket_radii = np.cbrt(voxels * np.prod(self.spacing_mm) * 0.75 / np.pi)
        z, y, x = self.pockets_mm.T
        wider = (np.hypot(y, x) + self.pocket_radii) / (self.reach(y, x) * self.taper(z))
        growth = float(np.clip(wider.max(initial=1), 1, 1.2 if hard else 1.1))
        self.half_y, self.half_x = growth * self.half_y, growth * self.half_x
        if hard:
            self._open_bays(rng)
        self.carina_mm = np.array([0.62 * self.height, 0.25 * self.half_y, 0.0])
        self.hila_mm = (
            np.array([0.52 * self.height, 0.2 * self.half_y, -0.30 * self.half_x]),
            np.array([0.55 * self.height, 0.2 * self.half_y, 0.32 * self.half_x]),
        )
        part = window or whole(shape_zyx)
        self.axis_index = axis_index - np.array([side.start for side in part], np.float32)
        self.y, self.x = (
            ((np.arange(side.start, side.stop) - middle) * step).astype(np.float32).reshape(form)
            for side, middle, step, form in zip(
                part[1:], axis_index[1:], spacing_mm[1:], [(-1, 1), (1, -1)], strict=True
            )
        )
        self.all = self.plan(self.y, self.x)
        self.angle = np.arctan2(np.abs(self.x), self.y)  # 0 at the spine, pi at the sternum
        self.texture = _Texture(shape_zyx, part, rng)
        self.body_hu = self._body()

    def _open_bays(self, rng: np.random.Generator) -> None:
        """In place of a pocket around each lesion, the lung reaches out to each that touches the wall, by
        balls that widen inwards; and to some places where nothing is, or bays would tell of lesions."""
        lesions = list(zip(self.lesions_mm, self.pocket_radii, strict=True))
        for _ in range(EMPTY_BAYS):
            height, angle, out = rng.uniform((0.2, 0, 0.97), (0.85, 2 * np.pi, 1.07))
            y, x = np.cos(angle), np.sin(angle)
            reach = out * self.reach(y, x) * self.taper(height * self.height)
            lesions.append((np.array([height * self.height, reach * y, reach * x]), rng.uniform(3, 9)))
        self.pockets_mm, self.pocket_radii = np.empty((0, 3), np.float32), np.empty(0, np.float32)
        bays = []
        for centre, radius in lesions:
            if self.depth(centre) > radius:
                continue
            side = 1 if centre[2] > 0 else -1
            height = np.clip(centre[0], 0.25 * self.height, 0.75 * self.height)
            inward = np.array([height, 0.1 * self.half_y, 0.5 * side * self.half_x]) - centre
            inward /= np.linalg.norm(inward)
            for step in range(40):
                ball = centre + (STANDS_OUT + step / 2) * radius * inward
                bays.append((ball, radius * (1 + OPENING * step / 2)))
                if self.depth(ball) > radius / 2:
                    break
        self.pockets_mm = np.array([ball for ball, _ in bays], np.float32).reshape(-1, 3)
        self.pocket_radii = np.array([radius for _, radius in bays], np.float32)

    def depth(self, point_mm: np.ndarray) -> float:
        """How deep a point lies in the lung, in mm; negative outside."""
        z, y, x = point_mm
        return -float(self.lung_distance(z, self.plan(y, x)))

    def fissure_y(self, z: float) -> float:
        """Where the oblique fissure of both lungs lies at height `z`."""
        return self.fissure_slope * (z - 0.45 * self.height)

    def reach(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """How far the widest section of the rib cage (a superellipse) reaches in the direction (y, x)."""
        radius = np.hypot(y, x) + 1e-3
        rho = (np.abs(y / self.half_y) ** 2.4 + np.abs(x / self.half_x) ** 2.4) ** (1 / 2.4) + 1e-6
        return (radius / rho).astype(np.float32)

    def taper(self, z: np.ndarray | float) -> np.ndarray:
        """Relative width of the rib cage at height `z`: it closes towards the neck."""
        above = np.clip(np.asarray(z, np.float32) / self.height - 0.5, 0, 0.47)
        return np.sqrt(1 - (above / 0.48) ** 2)

    def plan(self, y: np.ndarray, x: np.ndarray) -> _Plan:
        front = np.clip(-y / self.half_y, 0, 1)
        heart_x = (x - 0.17 * self.half_x) / (0.48 * self.half_x)
        heart_y = (y + 0.3 * self.half_y) / (0.52 * self.half_y)
        # Two domes: highest over the middle of each lung, low at the back.
        across = ((np.abs(x) - 0.5 * self.half_x) / (0.4 * self.half_x)) ** 2
        along = ((y + 0.15 * self.half_y) / (0.7 * self.half_y)) ** 2
        return _Plan(
            y=y,
            x=x,
            radius=np.hypot(y, x),
            wall=self.reach(y, x),
            diaphragm=self.height
            * (0.16 * np.exp(-across - along) + np.where(x < 0, np.float32(0.08), np.float32(0.06))),
            spine=25 - np.hypot(y - 0.82 * self.half_y, x),
            mediastinum=28 - 18 * front - np.abs(x),
            heart=heart_x**2 + heart_y**2,
        )

    def lung_distance(self, z: np.ndarray | float, plan: _Plan) -> np.ndarray:
        """Distance to the lungs' surface at heights `z` over the places of `plan`."""
        z = np.asarray(z, np.float32)
        h = z / self.height
        distance = np.maximum(plan.radius - plan.wall * self.taper(z), plan.diaphragm - z)
        distance = np.maximum(distance, plan.spine)
        distance = np.maximum(distance, plan.mediastinum + 8 * np.exp(-(((h - 0.52) / 0.12) ** 2)))
        distance = np.maximum(distance, 40 - 40 * np.sqrt(plan.heart + ((h - 0.3) / 0.22) ** 2))
        for (pz, py, px), radius in zip(self.pockets_mm, self.pocket_radii, strict=True):
            if np.min(np.abs(z - pz)) < radius:
                pocket = np.sqrt((z - pz) ** 2 + (plan.y - py) ** 2 + (plan.x - px) ** 2) - radius
                distance = np.minimum(distance, pocket)
        return distance

    def points_in_lung(self, count: int, depth_mm: float, side: int, rng: np.random.Generator) -> np.ndarray:
        """`count` random points [n, 3] at least `depth_mm` deep in the lung at side -1 or 1 of the image."""
        kept: list[np.ndarray] = []
        while sum(map(len, kept)) < count:
            tries = rng.uniform((0, -1, 0), (1, 1, 1.1), (4 * count, 3))
            tries *= (self.height, self.half_y, side * self.half_x)
            z, y, x = tries.T
            kept.append(tries[self.lung_distance(z, self.plan(y, x)) < -depth_mm])
        return np.concatenate(kept)[:count]

    def slice_hu(self, index: int) -> np.ndarray:
        """float32 HU [y, x] of one slice without vessels, airways, lesions and noise."""
        z = float((index - self.axis_index[0]) * self.spacing_mm[0])
        cage = self.all.radius - self.all.wall * self.taper(z)
        soft = self.texture.at(index)
        hu = self.body_hu + 12 * soft
        _mix(hu, cage - 13 - 4 * soft, MUSCLE_HU)
        inside = np.where(soft > 0.9, np.float32(FAT_HU + 30), np.float32(BLOOD_HU))
        inside[self.all.diaphragm > z] = LIVER_HU
        _mix(hu, cage + 1, inside)
        self._bones(hu, z, cage)
        lung = self.lung_distance(z, self.all)
        fissure = np.abs(self.y - self.fissure_y(z)) < 0.7
        parenchyma = LUNG_HU + 30 * self.y / self.half_y + 18 * soft + np.float32(110) * fissure
        _mix(hu, lung, parenchyma)
        return hu

    def _body(self) -> np.ndarray:
        """Fat under the skin, and the scanner's table, alike in all slices."""
        hu = np.full((self.y.size, self.x.size), AIR_HU, np.float32)
        outline = self.all.radius - 1.03 * self.all.wall - 24
        _mix(hu, outline, 20.0)
        _mix(hu, outline + 2, FAT_HU)
        table = np.abs(self.y - 1.03 * self.half_y - 34 + (self.x / 40) ** 2) - 1.5
        _mix(hu, np.maximum(table, -outline), -300.0)
        return hu

    def _bones(self, hu: np.ndarray, z: float, cage: np.ndarray) -> None:
        """Ribs that descend from the spine to the front, vertebrae with their canal, the sternum."""
        shell = (np.abs(cage - 5) < 5) & (self.angle < 2.6)
        phase = (z + 22 * self.angle[shell]) % 26
        ribs = hu[shell]
        _bone(ribs, np.maximum(np.abs(cage[shell] - 5) - 4, np.abs(phase - 6) - 5))
        hu[shell] = ribs
        middle = np.flatnonzero(np.abs(self.x[0]) < 30)
        if not middle.size:
            return
        columns = slice(middle[0], middle[-1] + 1)
        x, y, hu = self.x[:, columns], self.y, hu[:, columns]
        back = y - 0.95 * self.half_y
        _bone(hu, np.hypot(0.85 * x, back) - (16 if z % 24 > 4 else 14))
        _bone(hu, np.abs(np.hypot(x, back - 24) - 11) - 3)
        _bone(hu, np.maximum(np.abs(x) - 3, np.abs(back - 44) - 9))
        _bone(hu, np.maximum(np.abs(x) - 16, np.abs(y + self.half_y * self.taper(z) + 4) - 5))
        _mix(hu, np.hypot(x, back - 24) - 8, 30.0)


class _Texture:
    """Smooth random fields of unit variance, about 10 mm wide, made slice by slice in a window."""

    def __init__(self, shape_zyx: tuple[int, int, int], window: Window, rng: np.random.Generator) -> None:
        depth, height, width = shape_zyx
        self.coarse = rng.standard_normal((depth // 4 + 2, 40, 40)).astype(np.float32)
        slices, rows, columns = window
        self.first = slices.start
        self.rows, self.columns = _tents(height, 40)[rows], _tents(width, 40)[columns]

    def at(self, index: int) -> np.ndarray:
        step, rest = divmod(self.first + index, 4)
        plane = (1 - rest / 4) * self.coarse[step] + rest / 4 * self.coarse[step + 1]
        return 1.5 * self.rows @ plane @ self.columns.T


def _tents(fine: int, coarse: int) -> np.ndarray:
    """Matrix [fine, coarse] of linear interpolation."""
    places = np.linspace(0, coarse - 1, fine)[:, None]
    return np.clip(1 - np.abs(places - np.arange(coarse)), 0, 1).astype(np.float32)


def _mix(hu: np.ndarray, distance: np.ndarray, inner_hu: np.ndarray | float) -> None:
    """Replace what lies inside, in place, with a soft edge."""
    hu += np.clip(0.5 - distance / EDGE_MM, 0, 1) * (inner_hu - hu)


def _bone(hu: np.ndarray, distance: np.ndarray) -> None:
    _mix(hu, distance, 650.0)
    _mix(hu, distance + 2.5, 220.0)
