"""`lungseg fit-post`: settings of how probabilities become nodules, tried on val, chosen and recorded."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np

from lungseg import __version__
from lungseg.config import SegmentConfig, resegmented
from lungseg.config.fields import CandidateScore
from lungseg.dataset.stored_scans import StoredScan, StoredScanEntry
from lungseg.evaluate.bootstrap import FEW_PATIENTS
from lungseg.evaluate.choosing import By, Choices, Masking, Pick, Ranking, Tried, choose
from lungseg.evaluate.froc import Hits
from lungseg.evaluate.kept import Prediction, Turn
from lungseg.evaluate.marks import candidate_hits
from lungseg.evaluate.matching import overlap
from lungseg.evaluate.scans import HeldOut, Member, Refuse, held_out, load_networks, run_scans
from lungseg.runs.ensemble import Ensemble
from lungseg.runs.post import Post, record_post
from lungseg.segment.candidates import Candidate, find_candidates
from lungseg.segment.nodules import highest_scores, sharing
from lungseg.segment.postprocess import components
from lungseg.show import table
from lungseg.storage import Store
from lungseg.telemetry import progress

SHOWN = 5
Candidates = tuple[np.ndarray, Sequence[Candidate]]
"""As `find_candidates` gives them."""


@dataclass(frozen=True)
class Trying:
    """The task of one scan, `scans` by whether mirror images are seen."""

    scans: Mapping[bool, HeldOut]
    config: SegmentConfig
    choices: Choices

    @property
    def case_id(self) -> str:
        return self._entry.case_id

    @property
    def _entry(self) -> StoredScanEntry:
        return next(iter(self.scans.values())).entry

    def run(self, turn: Turn = nullcontext) -> Tried:
        hits: dict[Ranking, Hits] = {}
        masks: dict[Masking, tuple[int, int]] = {}
        for mirror, scan in self.scans.items():
            stored, said = scan.look(turn)
            candidates = {least: self._candidates(said, least) for least in self.choices.min_volume_mm3}
            for volume_mm3, (_, found) in candidates.items():
                by_score = candidate_hits(stored, found)
                hits |= {(mirror, volume_mm3, kind): one for kind, one in by_score.items()}
            for threshold in self.choices.threshold:
                counts = masked(stored, said, self.config, threshold, candidates, self.choices)
                for (volume_mm3, kind, least), both in counts.items():
                    masks[(mirror, volume_mm3, kind), threshold, least] = both
        nodules = len(next(iter(hits.values())).nodule_scores)
        return Tried(self.case_id, self._entry.patient, nodules, hits, masks)

    def _candidates(self, said: Prediction, min_volume_mm3: float) -> Candidates:
        config = self.config.model_copy(update={"min_volume_mm3": min_volume_mm3})
        return find_candidates(said.float32, said.geometry, config, said.lungs)


def masked(
    stored: StoredScan,
    said: Prediction,
    config: SegmentConfig,
    threshold: float,
    candidates: Mapping[float, Candidates],
    choices: Choices,
) -> dict[tuple[float, CandidateScore, float], tuple[int, int]]:
    """By the smallest volume, which is that of `candidates`, the kind of score and the lowest score: nodules
    that a component touches, and components that touch neither nodule nor what is ignored; on the grid that
    the network works on."""
    every = config.model_copy(update={"threshold": threshold, "min_volume_mm3": 0.0})
    labels = components(said.float32, every, said.geometry.spacing_mm, said.lungs)
    numbers = stored.numbers[said.box_in(stored.volume.geometry)]
    counted = overlap(np.maximum(numbers, 0), labels, numbers < 0)
    voxel_mm3 = float(np.prod(said.geometry.spacing_mm))
    size_mm3 = (counted.component_voxels + counted.ignored_voxels) * voxel_mm3
    touches = counted.shared > 0
    alone = ~touches.any(axis=0) & (counted.ignored_voxels == 0)
    counts = {}
    for volume_mm3, (at, found) in candidates.items():
        pairs = sharing(labels, at)
        for kind, least in product(choices.candidate_score, choices.min_score):
            best = highest_scores(pairs, found, kind)
            scores = np.array([best.get(label, 1.0) for label in counted.components.tolist()])
            left = (size_mm3 >= volume_mm3) & (scores >= least)
            hit, wrong = touches[:, left].any(axis=1).sum(), (alone & left).sum()
            counts[volume_mm3, kind, least] = int(hit), int(wrong)
    return counts


def fit_post(
    store: Store, model: Ensemble, members: Sequence[Member], by: By, fixed: Collection[str], refuse: Refuse
) -> tuple[Post, str]:
    """What is chosen for `model` on val, and the key where it is recorded. Settings named in `fixed` keep the
    model's own value, and are recorded with it.

    A scan that cannot be used is told to `refuse`, and the others decide. Raises as `held_out`, `run_scans`
    and `choose`.
    """
    choices = Choices.of(model.segment, fixed)
    scans = []
    for mirror in choices.mirror:
        asked = [_mirrored(one, mirror) for one in members]
        load_networks(store, asked, "val")
        scans.append(held_out(store, asked, "val"))
    tasks = [
        Trying(dict(zip(choices.mirror, one, strict=True)), model.segment, choices)
        for one in zip(*scans, strict=True)
    ]
    with progress("scans") as report:
        tried, _ = run_scans(tasks, report, refuse)
    ranking, masks = choose(tried, model.segment, choices, by)
    chosen = ranking.chosen.settings | {
        name: masks.chosen.settings[name] for name in ("threshold", "min_score")
    }
    post = Post(
        model=model.name,
        checkpoint=model.checkpoint,
        software=f"lungseg {__version__}",
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        by=by,
        settings={name: getattr(model.segment, name) for name in fixed} | chosen,
        patients=len({one.patient for one in tried}),
        case_ids=tuple(one.case_id for one in tried),
        ranking=_record(ranking),
        masks=_record(masks),
    )
    return post, record_post(store, model.root, post)


def _mirrored(member: Member, mirror: bool) -> Member:
    recipe = resegmented(member.model.recipe, [f"segment.mirror={json.dumps(mirror)}"])
    return replace(member, model=replace(member.model, recipe=recipe))


def _record(found: Pick) -> dict[str, Any]:
    return {
        "value": found.value,
        "best": found.best,
        "standard_error": found.standard_error,
        "tried": found.rows,
    }


def as_text(post: Post) -> str:
    """The best of what was tried for candidates and for masks, and what was chosen."""
    title = {"cpm": "CPM", "f2": "F2 at one false positive a scan"}[post.by]
    best = sorted(post.ranking["tried"], key=lambda row: -row["value"])[:SHOWN]
    rankings = [
        [
            str(row["mirror"]).lower(),
            f"{row['min_volume_mm3']:g}",
            row["candidate_score"],
            f"{row['value']:.4f}",
        ]
        for row in best
    ]
    allowed = (row for row in post.masks["tried"] if row["allowed"])
    masks = [
        [
            f"{row['threshold']:g}",
            f"{row['min_score']:g}",
            f"{row['false_positives_per_scan']:.2f}",
            f"{row['value']:.4f}",
        ]
        for row in sorted(allowed, key=lambda row: -row["value"])[:SHOWN]
    ]
    few = ["Of so few patients the choice means little."] if post.patients < FEW_PATIENTS else []
    return "\n".join(
        [
            f"{post.model} on val: {len(post.case_ids)} scans of {post.patients} patients",
            *few,
            "",
            table(["mirror", "min_volume_mm3", "candidate_score", title], rankings),
            _chosen(title, post.ranking),
            "",
            table(["threshold", "min_score", "false positives a scan", "F2 of the masks"], masks),
            _chosen("F2", post.masks),
            "",
            *(f"{override}" for override in post.overrides),
        ]
    )


def _chosen(title: str, found: Mapping[str, Any]) -> str:
    return (
        f"{title} of the simplest within one standard error ({found['standard_error']:.4f}) of the best "
        f"({found['best']:.4f}): {found['value']:.4f}"
    )
