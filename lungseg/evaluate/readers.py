"""Readers beside the model: how far those who outlined a nodule agree, and where the model stands."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np

from lungseg.dataset.case import Truth
from lungseg.evaluate.kept import Box

SHARE = 0.5


@dataclass(frozen=True)
class ReaderDice:
    """Mean Dice of one nodule: over pairs of its readers; of each reader with the consensus of the others
    (what at least half of them enclosed); and of the model in the same places: with each reader, and with the
    consensus that leaves out each reader in turn. The model is the component that stands for the
    nodule, and scores 0 where none does. Readers who did not outline the nodule are not counted."""

    reader_with_reader: float
    reader_with_others: float
    model_with_reader: float
    model_with_others: float


def beside_readers(
    truth: Truth, number: int, box: Box, labels: np.ndarray, component: int | None, component_voxels: int
) -> ReaderDice | None:
    """Of nodule `number`; None where fewer than two readers are known. `labels` are those of `box`, and the
    `component` has so many voxels."""
    outlines = truth.outlines.get(number)
    masks = [one for one in outlines.masks if one.any()] if outlines else []
    if outlines is None or len(masks) < 2:
        return None
    model = np.zeros(masks[0].shape, bool)
    if component is not None:
        first = np.subtract(outlines.first_zyx, [side.start for side in box])
        low, high = np.maximum(first, 0), np.minimum(first + model.shape, labels.shape)
        here = tuple(map(slice, low, high))
        there = tuple(map(slice, low - first, high - first))
        model[there] = labels[here] == component
    return reader_dice(np.array(masks), model, component_voxels)


def reader_dice(masks: np.ndarray, model: np.ndarray, model_voxels: int) -> ReaderDice:
    """`masks` bool [reader, z, y, x] of two readers or more, none of them empty; `model` bool [z, y, x] is
    what lies in their box of the model's mask, which has `model_voxels`."""
    sizes = masks.sum(axis=(1, 2, 3))
    pairs = [
        2 * int((masks[a] & masks[b]).sum()) / int(sizes[a] + sizes[b])
        for a, b in combinations(range(len(masks)), 2)
    ]
    others = [np.delete(masks, reader, axis=0).mean(axis=0) >= SHARE for reader in range(len(masks))]

    def with_model(mask: np.ndarray) -> float:
        return 2 * int((model & mask).sum()) / (model_voxels + int(mask.sum()))

    return ReaderDice(
        reader_with_reader=fmean(pairs),
        reader_with_others=fmean(
            2 * int((mine & theirs).sum()) / int(mine.sum() + theirs.sum())
            for mine, theirs in zip(masks, others, strict=True)
        ),
        model_with_reader=fmean(map(with_model, masks)),
        model_with_others=fmean(map(with_model, others)),
    )
