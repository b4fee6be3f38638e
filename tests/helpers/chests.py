"""A chest that can be segmented without a network, in a scan that is turned against the patient's axes."""

from __future__ import annotations

import math

import numpy as np

from lungseg.config import parse_recipe
from lungseg.scan.volume import Geometry, Volume

RECIPE = parse_recipe({"segment": {"window_zyx": [64, 64, 64], "candidate_threshold": 0.49}})

# Feet-first, and turned by 15 degrees about the long axis.
C, S = math.cos(math.radians(15)), math.sin(math.radians(15))
TURNED = ((-C, -S, 0.0), (-S, C, 0.0), (0.0, 0.0, -1.0))
CENTRE_MM = np.array([20.0, -35.0, 300.0])
BALL_MM, WALL_MM = CENTRE_MM + np.array([[38, 5, -8], [0, -48, 20]])


def chest(geometry: Geometry, lungs: bool = True) -> Volume:
    """A body with two lungs and two dense balls of 12 mm, one in a lung, one in the chest wall."""
    place = geometry.to_lps_mm(np.stack(np.indices(geometry.shape_zyx), axis=-1))
    offset = place - CENTRE_MM
    hu = np.full(geometry.shape_zyx, -1000.0)
    hu[((offset / [82, 58, 200]) ** 2).sum(axis=-1) < 1] = 40
    for side in (-38, 38) if lungs else ():
        hu[(((offset - [side, 0, 0]) / [26, 36, 58]) ** 2).sum(axis=-1) < 1] = -850
    for ball in (BALL_MM, WALL_MM):
        hu[np.linalg.norm(place - ball, axis=-1) < 6] = 1000
    return Volume(hu.astype(np.int16), geometry)


def geometry(shape: tuple[int, int, int] = (50, 110, 120)) -> Geometry:
    spacing_mm = (2.5, 1.3, 1.5)
    rough = Geometry(shape, spacing_mm, (0.0, 0.0, 0.0), TURNED)
    middle = rough.to_lps_mm(tuple((side - 1) / 2 for side in shape))
    x, y, z = (CENTRE_MM - middle).tolist()
    return Geometry(shape, spacing_mm, (x, y, z), TURNED)


def dense(hu: np.ndarray) -> np.ndarray:
    """0.5 half-way between lung (-850) and ball (1000), just above the body (40)."""
    return np.clip((hu + 850) / 1850, 0, 1)
