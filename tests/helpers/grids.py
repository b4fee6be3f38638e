"""Grids for tests: every order of the axes, and turned ones."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.spatial.transform import Rotation

from lungseg.scan.volume import Geometry, vector

AXES = [
    np.eye(3)[list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def geometry_of(
    shape=(5, 6, 7), spacing=(2.5, 0.6, 0.7), origin=(-110.2, 30.1, -360.25632911), direction=None
):
    rows = np.eye(3) if direction is None else direction
    return Geometry(shape, spacing, origin, tuple(vector(row) for row in rows))


def turned(angles_deg: tuple[float, float, float]) -> np.ndarray:
    return Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
