"""The lungs of a CT by thresholding and morphology, without any training.

After Hu, Hoffman and Reinhardt, "Automatic lung segmentation for accurate quantitation of volumetric
X-ray CT images", IEEE Trans. Med. Imaging 20 (2001): air is thresholded, what lies around the body goes,
the largest regions stay, and a closing takes in vessels and nodules at the pleura. It works on blocks
of about 2.5 mm, whose mean also takes away most noise. Trachea and main bronchi stay, since they
touch the lungs; a tumour that fills a lung or a large part of its wall is left out.
"""

from __future__ import annotations

import math

import cc3d
import numpy as np
from scipy import ndimage

from lungseg.data.volume import Geometry, Volume, resample_onto, vector

BLOCK_MM = 2.5
AIR_BELOW_HU = -320
CLOSING_MM = 12.0  # takes in a 14 mm nodule at the pleura; more would take in the mediastinum
SMALLEST_ML = 50.0  # less air than this is bowel gas or a crop, not lungs
SECOND_SHARE = 0.2  # of the first lung's volume; where both are one region, bowel gas comes second


def lung_mask(volume: Volume) -> np.ndarray:
    """Both lungs as uint8 [z, y, x] on the grid of `volume`; all zero where no lungs are found."""
    blocks_hu, grid = _blocks(volume)
    lungs = np.zeros(blocks_hu.shape, np.float32)
    for lung in _largest(blocks_hu < AIR_BELOW_HU, grid):
        lungs[_closed(lung, grid.spacing_mm)] = 1
    if not lungs.any():
        return np.zeros(volume.volume_hu.shape, np.uint8)
    return (resample_onto(lungs, grid, volume.geometry, nearest=False) >= 0.5).astype(np.uint8)


def _blocks(volume: Volume) -> tuple[np.ndarray, Geometry]:
    """Means over blocks of about 2.5 mm, and their grid; the last voxels are repeated to fill a block."""
    geometry = volume.geometry
    factors = [max(1, round(BLOCK_MM / spacing)) for spacing in geometry.spacing_mm]
    missing = [(0, -length % factor) for length, factor in zip(geometry.shape_zyx, factors, strict=True)]
    means = np.pad(volume.volume_hu, missing, mode="edge")
    for axis, factor in enumerate(factors):
        split = (*means.shape[:axis], -1, factor, *means.shape[axis + 1 :])
        means = means.reshape(split).mean(axis=axis + 1, dtype=np.float32)
    depth, height, width = means.shape
    first_centre = (np.array(factors) - 1) / 2
    grid = Geometry(
        (depth, height, width),
        vector(np.multiply(factors, geometry.spacing_mm)),
        vector(geometry.to_lps_mm(first_centre)),
        geometry.direction_lps,
    )
    return means, grid


def _largest(air: np.ndarray, grid: Geometry) -> list[np.ndarray]:
    """The one or two largest regions of `air` within the body.

    Air around the body lies against the sides of the scan with much of its surface; a lung that a
    narrow field of view cuts does so with little. A region goes if its contact with the sides (not
    with the first and last axial slice, where lungs end too) exceeds volume^(2/3).
    """
    labels, count = cc3d.connected_components(air, connectivity=6, return_N=True)
    voxel_mm3 = math.prod(grid.spacing_mm)
    volumes_mm3 = np.bincount(labels.ravel(), minlength=count + 1) * voxel_mm3
    contact_mm2 = np.zeros(count + 1)
    head_axis = 2 - int(np.argmax(np.abs(grid.direction_lps[2])))
    for axis in {0, 1, 2} - {head_axis}:
        sides = labels.take([0, -1], axis).ravel()
        contact_mm2 += np.bincount(sides, minlength=count + 1) * (voxel_mm3 / grid.spacing_mm[axis])
    inside_mm3 = np.where(contact_mm2 > np.cbrt(volumes_mm3) ** 2, 0, volumes_mm3)
    inside_mm3[0] = 0
    order = np.argsort(inside_mm3)[::-1][:2]
    least_mm3 = max(SMALLEST_ML * 1000, SECOND_SHARE * inside_mm3[order[0]])
    return [labels == label for label in order if inside_mm3[label] >= least_mm3]


def _closed(lung: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """`lung` closed by a ball, and without holes."""
    margin = [(math.ceil(CLOSING_MM / spacing) + 1,) * 2 for spacing in spacing_mm]
    padded = np.pad(lung, margin)
    box = ndimage.find_objects(padded.view(np.uint8))[0]
    box = tuple(slice(one.start - pad[0], one.stop + pad[0]) for one, pad in zip(box, margin, strict=True))
    grown = ndimage.distance_transform_edt(~padded[box], spacing_mm) <= CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, spacing_mm) > CLOSING_MM
    padded[box] |= ndimage.binary_fill_holes(closed)
    return padded[tuple(slice(pad[0], -pad[0]) for pad in margin)]
