"""What is mistaken for a nodule: dots, scars, plaques, and in hard phantoms lymph nodes and bands too."""

from __future__ import annotations

import numpy as np

from lungseg.sources.phantom.anatomy import Chest
from lungseg.sources.phantom.branches import Tube, stamp_ellipsoid, stamp_tube

NODE_HU = 35.0


def distract(hu: np.ndarray, chest: Chest, rng: np.random.Generator) -> None:
    """What a threshold takes for nodules: dots below 3 mm, scars like sheets, plaques on the pleura."""
    for side in (-1, 1):
        for point in chest.points_in_lung(25, 3.0, side, rng):
            stamp_ellipsoid(hu, chest, point, np.eye(3), np.full(3, rng.uniform(0.7, 1.3)), 30.0)
        for point in chest.points_in_lung(4, 8.0, side, rng):
            turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
            sheet = np.array([0.9, rng.uniform(4, 9), rng.uniform(8, 16)])
            stamp_ellipsoid(hu, chest, point, turn, sheet, rng.uniform(-150, 20))
        for point in chest.points_in_lung(4, 8.0, side, rng):
            outward = point * (0, 1, 1) / np.hypot(*point[1:])
            z, y, x = (point + np.arange(0, 400, 0.5)[:, None] * outward).T
            edge = 0.5 * int(np.argmax(chest.lung_distance(z, chest.plan(y, x)) > 0))
            turn = np.stack([outward, (1.0, 0, 0), np.cross(outward, (1.0, 0, 0))])
            plaque = np.array([rng.uniform(1.5, 2.5), rng.uniform(8, 16), rng.uniform(8, 16)])
            stamp_ellipsoid(hu, chest, point + edge * outward, turn, plaque, 60.0)


def mislead(hu: np.ndarray, chest: Chest, rng: np.random.Generator) -> None:
    """Lymph nodes at the hila and flat ones on the fissures, bands that hang on the pleura, more scars."""
    for hilum in chest.hila_mm:
        for place in rng.normal(hilum, (14, 10, 6), (4, 3)):
            turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
            stamp_ellipsoid(hu, chest, place, turn, rng.uniform(3, 8, 3), NODE_HU)
    along, across = np.array([1.0, chest.fissure_slope, 0.0]), np.array([-chest.fissure_slope, 1.0, 0.0])
    turn = np.stack([across, along, (0, 0, np.hypot(*along[:2]))]) / np.hypot(*along[:2])
    for side in (-1, 1):
        for point in chest.points_in_lung(60, 5.0, side, rng)[:12]:
            point[1] = chest.fissure_y(point[0])
            if chest.depth(point) > 3:
                lens = np.array([rng.uniform(1.0, 1.6), *rng.uniform(2.5, 5, 2)])
                stamp_ellipsoid(hu, chest, point, turn, lens, rng.uniform(-100, 30))
        for point in chest.points_in_lung(6, 8.0, side, rng):
            outward = rng.standard_normal(3)
            outward /= np.linalg.norm(outward)
            steps = point + np.arange(0, 200, 0.5)[:, None] * outward
            z, y, x = steps.T
            edge = int(np.argmax(chest.lung_distance(z, chest.plan(y, x)) > 0))
            inner = steps[max(edge - rng.integers(16, 50), 0)]
            band = Tube(steps[edge], inner, rng.uniform(0.8, 2.0), 0.5)
            stamp_tube(hu, chest, band, rng.uniform(-200, 30))
        for point in chest.points_in_lung(6, 2.0, side, rng):
            turned = np.linalg.qr(rng.standard_normal((3, 3)))[0]
            scar = np.array([rng.uniform(0.9, 1.8), rng.uniform(3, 6), rng.uniform(8, 16)])
            stamp_ellipsoid(hu, chest, point, turned, scar, rng.uniform(-250, 20))
