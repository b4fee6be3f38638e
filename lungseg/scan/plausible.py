"""What a CT of a patient cannot be, whatever format it comes in.

Headers in metres or microns, sheared slices and values that are no HU are read by most software without a
word, and every length, volume and threshold after that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lungseg.config.fields import LARGEST_SPACING_MM, SMALLEST_SPACING_MM
from lungseg.errors import GeometryError

AIR_BELOW_HU = -300
LEAST_AIR = 0.001
DENSE_ABOVE_HU = 600
MOST_DENSE = 0.3
"""Of the voxels above air: a chest has 2 %, and 50 % if 1024 was added; a nodule's surroundings have none."""
RIGHT_ANGLE_TOLERANCE = (
    1e-3  # cosine: headers with four decimals pass, a gantry tilted by 0.1 degrees does not
)


class Grid(NamedTuple):
    """What a header says of a grid: spacing and the columns of `axes` [3, 3] are those of x, y and z."""

    shape_zyx: tuple[int, ...]
    spacing_xyz_mm: np.ndarray
    axes: np.ndarray
    origin_lps_mm: np.ndarray


def require_spacing(spacing_mm: Sequence[float], **where: Any) -> None:
    """Raises GeometryError("spacing-implausible") unless each could be a CT's, in millimetres."""
    if not all(SMALLEST_SPACING_MM <= one <= LARGEST_SPACING_MM for one in spacing_mm):  # NaN is none either
        shown = " x ".join(f"{one:g}" for one in spacing_mm)
        remedy = (
            f"voxels of a CT are {SMALLEST_SPACING_MM:g} to {LARGEST_SPACING_MM:g} mm apart: "
            "convert the scan again, with its spacing in millimetres"
        )
        raise GeometryError("spacing-implausible", spacing_mm=shown, **where, remedy=remedy)


def at_right_angles(axes: np.ndarray, **where: Any) -> np.ndarray:
    """The unit vectors in the columns of `axes` [3, 3], free of what a rounded header adds to their angles.

    Raises GeometryError("gantry-tilt") where the axes are not at right angles.
    """
    off = np.abs(axes.T @ axes - np.eye(3)).max()
    if not off <= RIGHT_ANGLE_TOLERANCE:  # NaN neither
        remedy = "the slices are sheared (gantry tilt): resample the scan to a straight grid first"
        raise GeometryError("gantry-tilt", **where, remedy=remedy)
    if off < 1e-9:
        return axes
    left, _, right = np.linalg.svd(axes)
    straight: np.ndarray = left @ right
    return straight


def not_hu(values: np.ndarray) -> str:
    """Why the values of a CT of the chest, or of a part of it, are probably no HU; "" where they may be."""
    air = np.count_nonzero(values < AIR_BELOW_HU)
    if air < LEAST_AIR * values.size:
        return f"hardly a voxel is below {AIR_BELOW_HU} HU, as lungs are; the lowest is {values.min()}"
    if np.count_nonzero(values > DENSE_ABOVE_HU) > MOST_DENSE * (values.size - air):
        return f"much of what is no air is above {DENSE_ABOVE_HU} HU, as only bone is: perhaps HU + 1024"
    return ""
