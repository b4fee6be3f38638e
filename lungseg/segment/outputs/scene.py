"""What the page's viewer shows: the scan at 1.5 mm, each nodule at the scan's own resolution, and surfaces.

Images are NIfTI of bytes, steps of 6 HU; surfaces are MZ3, the viewer's own format. All are gzip in base64.
"""

from __future__ import annotations

import base64
import gzip
import struct

import numpy as np
from scipy import ndimage
from skimage.measure import marching_cubes

from lungseg.scan.nifti import encode
from lungseg.scan.resample import along_lps, resample, resample_onto
from lungseg.scan.volume import Geometry, Vector, Volume, bounding_box
from lungseg.segment.predict import Segmentation

OVERVIEW_MM, AROUND_LUNGS_MM, CLOSE_UP_MM, LUNG_SURFACE_MM = 1.5, 20.0, 64.0, 4.0
STEP_HU, LOWEST_HU = 6, -1030
Images = dict[str, str]
"""`image` and, on its grid, `labels`."""


class Scene:
    """A segmented scan along the patient's axes: rows run to the left, columns to the back."""

    def __init__(self, segmentation: Segmentation, volume: Volume) -> None:
        self._segmentation = segmentation
        self.volume = along_lps(volume)
        self.labels = along_lps(Volume(segmentation.labels, segmentation.geometry)).volume_hu

    def overview(self, most_bytes: int) -> Images:
        """The lungs and what lies around them, or all of the scan where none were found. Where it takes more
        than `most_bytes`, it is coarser."""
        whole, lungs = self.volume, self._segmentation.lungs
        if lungs is not None:
            grid = self._segmentation.working
            box = bounding_box(lungs)
            ends = [[side.start - 0.5, side.stop - 0.5] for side in box]
            corners = np.array(np.meshgrid(*ends)).reshape(3, -1).T
            box = self.box(grid.to_lps_mm(corners), AROUND_LUNGS_MM)
            whole = Volume(whole.volume_hu[box], whole.geometry.part(box))
        spacing_mm = OVERVIEW_MM
        while True:
            small = resample(whole, (spacing_mm, spacing_mm, spacing_mm))
            labels = resample_onto(self.labels, self.volume.geometry, small.geometry)
            images = self._images(small.volume_hu, labels, small.geometry)
            if sum(map(len, images.values())) <= most_bytes:
                return images
            spacing_mm *= 2 ** (1 / 3)

    def close_up(self, number: int) -> Images:
        """A cube around the nodule `number`, counted from 0, on the scan's own grid."""
        box = self.box(np.array([self._segmentation.nodules[number].centre_lps_mm]), CLOSE_UP_MM / 2)
        return self._images(self.volume.volume_hu[box], self.labels[box], self.volume.geometry.part(box))

    def surface(self, number: int) -> str:
        """A coarser one than was measured."""
        one = self._segmentation.surfaces[number]
        diameter_mm = self._segmentation.nodules[number].equivalent_diameter_mm
        return _mz3(*_coarser(one.points_lps_mm, one.triangles, max(0.4, diameter_mm / 30)))

    def lungs(self) -> str | None:
        """Their surface, smoothed: the mask has the stairs of its blocks."""
        mask, grid = self._segmentation.lungs, self._segmentation.working
        if mask is None:
            return None
        small = resample(Volume(100 * mask.astype(np.int16), grid), (LUNG_SURFACE_MM,) * 3)
        soft = ndimage.gaussian_filter(np.pad(small.volume_hu.astype(np.float32), 2), 0.7)
        points, triangles, _, _ = marching_cubes(soft, 50)
        return _mz3(small.geometry.to_lps_mm(points - 2), triangles)

    def box(self, points_lps_mm: np.ndarray, margin_mm: float) -> tuple[slice, ...]:
        """The scan's voxels around patient coordinates [n, 3], as far as there are any."""
        geometry = self.volume.geometry
        indices = geometry.to_index_zyx(points_lps_mm)
        margin = np.divide(margin_mm, geometry.spacing_mm)
        last = np.subtract(geometry.shape_zyx, 1)
        first = np.clip(np.floor(indices.min(axis=0) - margin), 0, last).astype(int)
        stop = np.clip(np.ceil(indices.max(axis=0) + margin), 0, last).astype(int) + 1
        return tuple(map(slice, first.tolist(), stop.tolist()))

    def _images(self, hu: np.ndarray, labels: np.ndarray, geometry: Geometry) -> Images:
        steps = np.clip(np.rint((hu.astype(np.float32) - LOWEST_HU) / STEP_HU), 0, 255).astype(np.uint8)
        shown = (labels > 0).astype(np.uint8)
        return {
            "image": _packed(encode(steps, _lps(geometry), (STEP_HU, LOWEST_HU))),
            "labels": _packed(encode(shown, _lps(geometry))),
        }


def ras(lps_mm: Vector) -> list[float]:
    """The viewer's coordinates, in mm."""
    x, y, z = lps_mm
    return [round(-x, 2), round(-y, 2), round(z, 2)]


def _lps(geometry: Geometry) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = np.multiply(geometry.direction_lps, geometry.spacing_mm[::-1])
    matrix[:3, 3] = geometry.origin_lps_mm
    return matrix


def _coarser(points: np.ndarray, triangles: np.ndarray, cell_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """All points of a cell become their mean (Rossignac and Borrel, 1993)."""
    cells = np.floor(points / cell_mm).astype(np.int64)
    _, cell, count = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(cell, along) for along in points.T.astype(np.float64)], axis=1)
    corners = cell[triangles]
    flat = (corners == np.roll(corners, 1, axis=1)).any(axis=1)
    return means / count[:, np.newaxis], corners[~flat]


def _mz3(points_lps_mm: np.ndarray, triangles: np.ndarray) -> str:
    header = struct.pack("<2sHIII", b"MZ", 3, len(triangles), len(points_lps_mm), 0)
    points = (points_lps_mm * (-1, -1, 1)).astype("<f4")
    # scikit-image's triangles show their backs where x and y are counted the other way.
    return _packed(header + triangles.astype("<i4").tobytes() + points.tobytes())


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()
