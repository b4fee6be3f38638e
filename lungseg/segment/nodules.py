"""From probabilities to nodules: the components of which a network is sure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cc3d
import numpy as np

from lungseg.config import SegmentConfig
from lungseg.config.fields import CandidateScore
from lungseg.scan.volume import Geometry
from lungseg.segment.candidates import Candidate, find_candidates
from lungseg.segment.postprocess import components

MOST_SEARCHED_MM3 = 1e6
"""A litre, a fifth of both lungs."""


def find_nodules(
    probability: np.ndarray, geometry: Geometry, config: SegmentConfig, lungs: np.ndarray | None = None
) -> tuple[np.ndarray, dict[int, float]]:
    """int32 labels [z, y, x], 1 the largest nodule, and the confidences of those that have one.

    Of the `components` of `probability` (float32 [z, y, x] on the grid of `geometry`) those go whose
    confidence is below `config.min_score`. Ranked by the mean, doubt is seen: what a network is sure of has a
    sharp rim, what it doubts often a wide one of low probabilities, however high its middle.
    """
    labels = components(probability, config, geometry.spacing_mm, lungs)
    confidence = confidences(labels, probability, geometry, config, lungs)
    sure = np.array([confidence.get(label, 1.0) >= config.min_score for label in range(labels.max() + 1)])
    if sure.all():
        return labels, confidence
    sure[0] = False
    renumbered = np.where(sure, np.cumsum(sure), 0).astype(np.int32)
    return renumbered[labels], {int(renumbered[one]): confidence[one] for one in confidence if sure[one]}


def confidences(
    labels: np.ndarray,
    probability: np.ndarray,
    geometry: Geometry,
    config: SegmentConfig,
    lungs: np.ndarray | None = None,
) -> dict[int, float]:
    """The highest score of the candidates in each of `labels`, components of `probability` [z, y, x] on the
    grid of `geometry`; one without a candidate has none.

    Only the surroundings of nodules are searched: to part what runs together anywhere takes many times as
    long. Surroundings of more than MOST_SEARCHED_MM3, an untrained network's, are not: they say nothing of
    any place.
    """
    if not labels.any():
        return {}
    low = cc3d.connected_components(probability > config.candidate_threshold, connectivity=26)
    inside = np.flatnonzero(low)  # a small part: whatever is done to all voxels costs many times as much
    of_voxels = low.ravel()[inside]
    voxels = np.bincount(of_voxels, minlength=1)
    touched = np.zeros(voxels.size, bool)
    touched[low[labels > 0]] = True
    touched &= voxels * math.prod(geometry.spacing_mm) <= MOST_SEARCHED_MM3
    around = np.zeros_like(probability)
    searched = inside[touched[of_voxels]]
    around.ravel()[searched] = probability.ravel()[searched]
    candidate_labels, candidates = find_candidates(around, geometry, config, lungs)
    return highest_scores(sharing(labels, candidate_labels), candidates, config.candidate_score)


def sharing(labels: np.ndarray, candidate_labels: np.ndarray) -> list[tuple[int, int]]:
    """Which of `labels` and which candidates share voxels; both are [z, y, x], 0 where none is."""
    both = np.flatnonzero((labels > 0) & (candidate_labels > 0))
    pairs = np.stack([labels.ravel()[both], candidate_labels.ravel()[both]], axis=1)
    return [(label, candidate) for label, candidate in np.unique(pairs, axis=0).tolist()]


def highest_scores(
    pairs: Sequence[tuple[int, int]], candidates: Sequence[Candidate], kind: CandidateScore
) -> dict[int, float]:
    """By label, of the candidates that it shares voxels with; one that shares none is left out."""
    best: dict[int, float] = {}
    for label, candidate in pairs:
        best[label] = max(best.get(label, 0.0), candidates[candidate - 1].score(kind))
    return best
