"""Evaluate a run, or the mean of several, on whole held-out scans: each scored by itself, then the figures
of them all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lungseg import __version__
from lungseg.config import SegmentConfig
from lungseg.errors import DataError
from lungseg.evaluate.baseline import baseline_figures
from lungseg.evaluate.case import CaseResult, evaluate_case, mean_or_none
from lungseg.evaluate.kept import Turn
from lungseg.evaluate.outputs import tables
from lungseg.evaluate.page import render
from lungseg.evaluate.pictures import worst_nodules
from lungseg.evaluate.report import SCHEMA_VERSION, as_text, to_strict_json, write_files
from lungseg.evaluate.scans import HeldOut, Member, Refuse, held_out, run_scans
from lungseg.evaluate.summary import summary_tree
from lungseg.runs.ensemble import Ensemble
from lungseg.runs.post import Post
from lungseg.storage import Store, keys
from lungseg.telemetry import Progress

Scored = tuple[CaseResult, dict[str, list[float]]]


@dataclass(frozen=True)
class Evaluation:
    """Summaries of the model and, where asked for, of the HU-threshold baseline on the same scans; the
    model's report, and the prefix of its keys in the store."""

    model: dict[str, Any]
    baseline: dict[str, Any]
    text: Path
    json: Path
    key: str


@dataclass(frozen=True)
class Scoring:
    """The task of one scan."""

    scan: HeldOut
    config: SegmentConfig
    baseline: bool

    @property
    def case_id(self) -> str:
        return self.scan.entry.case_id

    def run(self, turn: Turn = nullcontext) -> Scored:
        stored, prediction = self.scan.look(turn)
        entry = self.scan.entry
        result = evaluate_case(stored, prediction, self.config, entry.case_id, entry.patient)
        return result, baseline_figures(stored, prediction, self.config) if self.baseline else {}


def evaluate_split(
    store: Store,
    members: Sequence[Member],
    split: str,
    out: Path,
    progress: Progress,
    refuse: Refuse,
    baseline: bool = False,
    post: Post | None = None,
) -> Evaluation:
    """Score the mean of `members` on every stored scan of `split`; the report goes to the store and to `out`.

    `post` says where settings come from. A scan that cannot be used is told to `refuse`, and the others go
    on. Raises as `held_out`, DataError("post-saw-test"), and what is wrong with the last scan where none can
    be used.
    """
    scans = {one.entry.case_id: one for one in held_out(store, members, split)}
    seen = scans.keys() & (post.case_ids if post and split == "test" else ())
    if seen:  # of the folds of a cross-validation: one's val is another's test
        message = f"fit-post chose its settings on {len(seen)} of the {len(scans)} scans to test"
        remedy = "give --no-post, or evaluate each run by itself, with what fit-post chose for it alone"
        raise DataError("post-saw-test", message=message, remedy=remedy)
    model = Ensemble(tuple(one.model for one in members), post)
    scored, broken = run_scans(
        [Scoring(one, model.segment, baseline) for one in scans.values()], progress, refuse
    )
    results = [result for result, _ in scored]
    created = datetime.now(UTC)
    tree = {
        **_facts(members, model, split, created, list(scans.values())),
        "left_out": [{"case_id": one.case_id, "code": one.error.code} for one in broken],
        **summary_tree(results, model.segment.candidate_score),
        "extra": {"threshold_baseline": _means([one for _, one in scored])} if baseline else {},
    }
    pictures = worst_nodules(results, model.segment, lambda case_id: scans[case_id].look())
    stamp = f"evaluation-{created:%Y%m%dT%H%M%SZ}"
    files = {
        f"{stamp}.txt": as_text(tree).encode(),
        f"{stamp}.json": to_strict_json(tree).encode(),
        f"{stamp}.html": render(tree, pictures).encode(),
        **{f"{stamp}/{name}": data for name, data in tables(results, tree).items()},
    }
    prefix = keys.evaluation(model.root, f"{model.checkpoint}-{split}")
    for name, data in files.items():
        store.put(f"{prefix}{name}", data)
    write_files(out, files)
    found = tree["extra"].get("threshold_baseline", {})
    return Evaluation(tree["summary"], found, out / f"{stamp}.txt", out / f"{stamp}.json", prefix)


def _facts(
    members: Sequence[Member], model: Ensemble, split: str, created: datetime, scans: Sequence[HeldOut]
) -> dict[str, Any]:
    """`networks_a_scan` are the least and the most networks that a scan is held out from."""
    manifests = {one.manifest.sha256: one.manifest.name for one in members}
    asked = [len(one.asked) for one in scans]
    return {
        "schema_version": SCHEMA_VERSION,
        "software": f"lungseg {__version__}",
        "created_utc": created.isoformat(timespec="seconds"),
        "run": model.name,
        "checkpoint": model.checkpoint,
        "members": [{"run": one.model.run, "checkpoint": one.model.checkpoint} for one in members],
        "networks_a_scan": [min(asked), max(asked)],
        "data": "+".join(manifests.values()),
        "manifest_sha256": "+".join(manifests),
        "split": split,
        "settings": model.segment.model_dump(mode="json"),
        "post": model.post and {"says": model.post.describe(), "settings": model.post.settings},
    }


def _means(figures: Sequence[dict[str, list[float]]]) -> dict[str, float | None]:
    """Over the scans, or nodules, of all."""
    return {name: mean_or_none([value for one in figures for value in one[name]]) for name in figures[0]}
