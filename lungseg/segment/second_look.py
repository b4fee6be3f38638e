"""A second look at each place that the windows found, as the network learned to see a nodule: in the middle
of a window of the training patches' shape.

The windows that tile a scan lie anywhere, so that a nodule is often near their borders; and they are larger
than the patches, from whose statistics instance norm then takes others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from lungseg.config import Recipe, SegmentConfig
from lungseg.scan.tiling import fitting
from lungseg.segment.postprocess import components
from lungseg.segment.windows import (
    HALF_TURNS,
    MIRROR_IMAGES,
    Box,
    Predictor,
    WeightedMean,
    in_flight,
    mean_of,
)

PROBABLE = 0.1
SPECK_MM3 = 5.0


def look_again(
    predict: Predictor, volume_hu: np.ndarray, mean: WeightedMean, recipe: Recipe, lungs: np.ndarray | None
) -> None:
    """Add to the `mean` over `volume_hu` (int16 [z, y, x]) a window around each of its places.

    A window counts as the mean of its half turns, with `segment.mirror` of all its mirror images. It is not
    larger than the volume, from which it never sticks out.
    """
    if not recipe.segment.second_looks:
        return
    window = fitting(recipe.data.patch.shape_zyx, volume_hu.shape, recipe.model.total_stride)
    turned = mean_of(predict, MIRROR_IMAGES if recipe.segment.mirror else HALF_TURNS)
    found = places(mean.value(), window, recipe, lungs)

    def ask(box: Box) -> np.ndarray:
        return turned(volume_hu[box][np.newaxis, ..., np.newaxis].astype(np.float32))[0, ..., 0]

    for box, probability in in_flight(ask, [around(place, window, volume_hu.shape) for place in found]):
        mean.add(box, probability)


def places(
    probability: np.ndarray, window: Sequence[int], recipe: Recipe, lungs: np.ndarray | None
) -> list[list[int]]:
    """Voxels (z, y, x) where `probability` may show a nodule, at most `segment.second_looks`, those of the
    highest probability first.

    They are the middles of components. One that is larger than `window`, a nodule and vessels perhaps, has
    its place where it is most probable.
    """
    # Whatever the settings of candidates are: these may change without the network being asked again.
    low = SegmentConfig(threshold=PROBABLE, min_volume_mm3=SPECK_MM3)
    labels = components(probability, low, recipe.data.spacing_mm, lungs)
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        inside = np.where(labels[box] == label, probability[box], 0)
        highest = np.unravel_index(inside.argmax(), inside.shape)
        fits = all(size <= side for size, side in zip(inside.shape, window, strict=True))
        middle = ndimage.center_of_mass(inside) if fits else highest
        place = [side.start + round(float(offset)) for side, offset in zip(box, middle, strict=True)]
        found.append((-float(inside[highest]), place))
    return [place for _, place in sorted(found)[: recipe.segment.second_looks]]


def around(place: Sequence[int], window: Sequence[int], shape: Sequence[int]) -> Box:
    """The box of `window` with `place` in its middle, moved into a volume of `shape` where it sticks out."""
    first = [
        min(max(0, middle - side // 2), size - side)
        for middle, side, size in zip(place, window, shape, strict=True)
    ]
    return tuple(slice(low, low + side) for low, side in zip(first, window, strict=True))
