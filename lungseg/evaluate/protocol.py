"""Evaluate a run on the whole held-out scans of its data set: one task a scan, then the figures of them all.

What the network says of a scan is kept in the store, so a killed evaluation goes on, and one at another
threshold needs no network. On a cluster the tasks are Ray's, each with a GPU where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from lungseg import __version__
from lungseg.cluster import on_a_cluster, run_tasks
from lungseg.dataset.manifest import Manifest
from lungseg.dataset.stored_scans import StoredScan, StoredScanEntry, read_scan
from lungseg.errors import DataError, GeometryError, LungsegError
from lungseg.evaluate.baseline import baseline_figures
from lungseg.evaluate.case import CaseResult, evaluate_case, mean_or_none
from lungseg.evaluate.kept import Prediction, kept_prediction, subject
from lungseg.evaluate.outputs import tables
from lungseg.evaluate.page import render
from lungseg.evaluate.pictures import worst_nodules
from lungseg.evaluate.report import SCHEMA_VERSION, as_text, to_strict_json, write_files
from lungseg.evaluate.summary import summary_tree
from lungseg.runs.run import Published
from lungseg.segment.sliding import Predictor
from lungseg.storage import Store, keys
from lungseg.telemetry import Progress, quiet_tensorflow

SCAN_BYTES = 3 << 30
"""Memory that Ray keeps free for the task of a scan, the network included."""
AT_ONCE = 2
"""Scans in this process: while the network sees one, another is scored."""
Refuse = Callable[[str, LungsegError], None]
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
class Broken:
    """A scan that cannot be used."""

    case_id: str
    error: LungsegError


@dataclass(frozen=True)
class Network:
    """A run's network as a predictor that is loaded where it is first used, once a process."""

    store: Store
    model: Published

    def __call__(self, volume_hu: np.ndarray) -> np.ndarray:
        return self.load()(volume_hu)

    def load(self) -> Predictor:
        name = (self.store.uri, self.model.run, self.model.checkpoint)
        if name not in _loaded:
            with quiet_tensorflow():
                from lungseg.runs.export import load_network

                _loaded[name] = load_network(self.store, self.model).predict
        return _loaded[name]


_loaded: dict[tuple[str, str, str], Predictor] = {}


@dataclass(frozen=True)
class Task:
    """One scan of an evaluation, for whichever process takes it."""

    store: Store
    entry: StoredScanEntry
    model: Published
    split: str
    predict: Predictor
    baseline: bool

    def look(self) -> tuple[StoredScan, Prediction]:
        """The scan, and what the network says of it. Raises what reading it raises."""
        prediction = kept_prediction(self.store, self.entry, self.model, self.split, self.predict)
        return read_scan(self.store, self.entry), prediction

    def run(self) -> Scored:
        """Raises as `look`."""
        config = self.model.recipe.segment
        stored, prediction = self.look()
        result = evaluate_case(stored, prediction, config, self.entry.case_id, self.entry.patient)
        return result, baseline_figures(stored, prediction, config) if self.baseline else {}


def evaluate_split(
    store: Store,
    manifest: Manifest,
    model: Published,
    predict: Predictor,
    split: str,
    out: Path,
    progress: Progress,
    refuse: Refuse,
    baseline: bool = False,
) -> Evaluation:
    """Score `model` on every stored volume of `split`; the report goes to the store and to `out`.

    A scan that cannot be used is told to `refuse`, and the others go on. Raises DataError("split-empty" or
    "held-out-format") of the data set, and what is wrong with the last scan where none can be used.
    """
    entries = manifest.require_held_out(split)
    tasks = [Task(store, entry, model, split, predict, baseline) for entry in entries]
    found = _run(tasks, progress, refuse)
    scored = [one for one in found if not isinstance(one, Broken)]
    broken = [one for one in found if isinstance(one, Broken)]
    if not scored:
        raise broken[-1].error
    results = [result for result, _ in scored]
    created = datetime.now(UTC)
    tree = {
        **_facts(manifest, model, split, created),
        "left_out": [{"case_id": one.case_id, "code": one.error.code} for one in broken],
        **summary_tree(results, model.recipe.segment.candidate_score),
        "extra": {"threshold_baseline": _means([one for _, one in scored])} if baseline else {},
    }
    looks = {task.entry.case_id: task.look for task in tasks}
    pictures = worst_nodules(results, model.recipe.segment, lambda case_id: looks[case_id]())
    stamp = f"evaluation-{created:%Y%m%dT%H%M%SZ}"
    files = {
        f"{stamp}.txt": as_text(tree).encode(),
        f"{stamp}.json": to_strict_json(tree).encode(),
        f"{stamp}.html": render(tree, pictures).encode(),
        **{f"{stamp}/{name}": data for name, data in tables(results, tree).items()},
    }
    prefix = keys.evaluation(keys.run_root(model.run), subject(model, split))
    for name, data in files.items():
        store.put(f"{prefix}{name}", data)
    write_files(out, files)
    found = tree["extra"].get("threshold_baseline", {})
    return Evaluation(tree["summary"], found, out / f"{stamp}.txt", out / f"{stamp}.json", prefix)


def _facts(manifest: Manifest, model: Published, split: str, created: datetime) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "software": f"lungseg {__version__}",
        "created_utc": created.isoformat(timespec="seconds"),
        "run": model.run,
        "checkpoint": model.checkpoint,
        "data": manifest.name,
        "manifest_sha256": manifest.sha256,
        "split": split,
        "settings": model.recipe.segment.model_dump(mode="json"),
    }


def _run(tasks: Sequence[Task], progress: Progress, refuse: Refuse) -> list[Scored | Broken]:
    """What each scan gave, in their order; what is wrong with one is told as it comes."""

    def tell(found: Scored | Broken) -> None:
        if isinstance(found, Broken):
            refuse(found.case_id, found.error)

    if on_a_cluster():
        return run_tasks(_attempt, [(task,) for task in tasks], SCAN_BYTES, progress, tell, gpus=True)
    found: list[Scored | Broken] = []
    turns = _Turns(tasks[0].predict)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        try:
            for one in threads.map(_attempt, [replace(task, predict=turns) for task in tasks]):
                found.append(one)
                tell(one)
                progress(len(found), len(tasks))
        except BaseException as error:
            turns.failure = turns.failure or error
            threads.shutdown(wait=False, cancel_futures=True)
            raise turns.failure from None
    return found


class _Turns:
    """A predictor for several threads, which take turns; after a failure nobody has one."""

    def __init__(self, predict: Predictor) -> None:
        self._predict, self._turn = predict, Lock()
        self.failure: BaseException | None = None

    def __call__(self, volume_hu: np.ndarray) -> np.ndarray:
        with self._turn:
            if self.failure:
                raise CancelledError
            try:
                return self._predict(volume_hu)
            except BaseException as error:
                self.failure = error
                raise


def _attempt(task: Task) -> Scored | Broken:
    """The error is returned, so that the others go on."""
    try:
        return task.run()
    except (DataError, GeometryError) as error:
        return Broken(task.entry.case_id, error)


def _means(figures: Sequence[dict[str, list[float]]]) -> dict[str, float | None]:
    """Over the scans, or nodules, of all."""
    return {name: mean_or_none([value for one in figures for value in one[name]]) for name in figures[0]}
