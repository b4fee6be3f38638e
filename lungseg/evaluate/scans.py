"""The held-out scans of a split, what networks say of each, and one task a scan over them all.

What a network says of a scan is kept in the store, so a killed command goes on, and one at other settings
needs no network. On a cluster the tasks are Ray's, each with a GPU where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol, TypeVar

import numpy as np

from lungseg.cluster import on_a_cluster, run_tasks
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.stored_scans import StoredScan, StoredScanEntry, read_scan
from lungseg.errors import DataError, GeometryError, LungsegError
from lungseg.evaluate.kept import Prediction, Turn, all_kept, kept_prediction, mean_prediction
from lungseg.runs.ensemble import Ensemble, load_ensemble
from lungseg.runs.fit import require_same_scans, require_same_splits
from lungseg.runs.run import Published, load_run_data
from lungseg.segment.predict import fineness
from lungseg.segment.windows import Predictor
from lungseg.storage import Store
from lungseg.telemetry import Progress, quiet_tensorflow

SCAN_BYTES = 3 << 30
"""Memory that Ray keeps free for the task of a scan, the network included."""
AT_ONCE = 2
"""Scans in this process: while the network sees one, another is scored."""
Refuse = Callable[[str, LungsegError], None]
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


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
class Member:
    """A network, how it is asked, and the data set in which scans are held out from it."""

    model: Published
    manifest: Manifest
    predict: Predictor


def load_members(
    store: Store,
    runs: Sequence[str],
    split: str,
    overrides: Sequence[str] = (),
    data: str = "",
    use_post: bool = True,
) -> tuple[Ensemble, list[Member]]:
    """As `load_ensemble`, and each member on the data set of its run, or on another of the same scans and
    splits.

    Raises as `load_run_data`, `require_same_splits`, `Manifest.require_held_out` and `load_ensemble`.
    """
    manifests = {}
    for run in runs:
        manifest = load_run_data(store, run)
        if data:
            manifest = require_same_splits(manifest, load_manifest(store, data))
        manifest.require_held_out(split)
        manifests[run] = manifest
    ensemble = load_ensemble(store, runs, overrides, use_post)
    return ensemble, [Member(one, manifests[one.run], Network(store, one)) for one in ensemble.members]


@dataclass(frozen=True)
class HeldOut:
    """A scan, and those members that it is held out from, each with its own copy; the finest grid first."""

    store: Store
    split: str
    asked: tuple[tuple[Member, StoredScanEntry], ...]

    @property
    def entry(self) -> StoredScanEntry:
        """On the grid on which the mean is formed."""
        return self.asked[0][1]

    def look(self, turn: Turn = nullcontext) -> tuple[StoredScan, Prediction]:
        """The scan, and what the networks say of it in the mean. Raises what reading it raises."""
        said = [
            kept_prediction(self.store, entry, one.model, self.split, one.predict, turn)
            for one, entry in self.asked
        ]
        stored = read_scan(self.store, self.entry)
        return stored, mean_prediction(said, stored.volume.geometry)


def held_out(store: Store, members: Sequence[Member], split: str) -> list[HeldOut]:
    """Every scan of the split in any member's data set. Only members that it is held out from are asked
    about it: of the folds of a cross-validation all scans are there, each for the network that never saw it.

    Raises DataError("split-empty", "held-out-format", "splits-differ").
    """
    asked: dict[str, list[tuple[Member, StoredScanEntry]]] = {}
    for one in sorted(members, key=lambda one: fineness(one.model.recipe.data.spacing_mm)):
        require_same_scans(members[0].manifest, one.manifest)
        for entry in one.manifest.require_held_out(split):
            asked.setdefault(entry.case_id, []).append((one, entry))
    return [HeldOut(store, split, tuple(those)) for those in asked.values()]


def load_networks(store: Store, members: Sequence[Member], split: str) -> None:
    """Those that are needed in this process, before the bar of the scans begins."""
    for one in members:
        kept = all_kept(store, one.manifest.require_held_out(split), one.model, split)
        if isinstance(one.predict, Network) and not kept and not on_a_cluster():
            one.predict.load()


class Task(Protocol[T_co]):
    """One scan, for whichever process takes it."""

    @property
    def case_id(self) -> str: ...

    def run(self, turn: Turn) -> T_co:
        """Asks networks through `turn` alone. Raises as `HeldOut.look`."""


@dataclass(frozen=True)
class Broken:
    """A scan that cannot be used."""

    case_id: str
    error: LungsegError


def run_scans(tasks: Sequence[Task[T]], progress: Progress, refuse: Refuse) -> tuple[list[T], list[Broken]]:
    """What each scan gave, in their order; what is wrong with one is told as it comes. Raises what is wrong
    with the last where none can be used."""

    def tell(found: Any) -> None:
        if isinstance(found, Broken):
            refuse(found.case_id, found.error)

    if on_a_cluster():
        found = run_tasks(_attempt, [(task,) for task in tasks], SCAN_BYTES, progress, tell, gpus=True)
    else:
        found = _in_threads(tasks, progress, tell)
    broken = [one for one in found if isinstance(one, Broken)]
    if len(broken) == len(found):
        raise broken[-1].error
    return [one for one in found if not isinstance(one, Broken)], broken


def _in_threads(tasks: Sequence[Task[T]], progress: Progress, tell: Callable[[Any], None]) -> list[Any]:
    found: list[Any] = []
    turns = _Turns()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        try:
            for one in threads.map(lambda task: _attempt(task, turns), tasks):
                found.append(one)
                tell(one)
                progress(len(found), len(tasks))
        except BaseException as error:
            turns.failure = turns.failure or error
            threads.shutdown(wait=False, cancel_futures=True)
            raise turns.failure from None
    return found


class _Turns:
    """Lets several threads ask networks, about one scan after another; after a failure nobody may."""

    def __init__(self) -> None:
        self._turn = Lock()
        self.failure: BaseException | None = None

    @contextmanager
    def __call__(self, predict: Predictor) -> Iterator[Predictor]:
        def until_failure(volume_hu: np.ndarray) -> np.ndarray:
            if self.failure:
                raise CancelledError
            try:
                return predict(volume_hu)
            except BaseException as error:
                self.failure = self.failure or error
                raise

        with self._turn:
            yield until_failure


def _attempt(task: Task[T], turn: Turn = nullcontext) -> T | Broken:
    """The error is returned, so that the others go on."""
    try:
        return task.run(turn)
    except (DataError, GeometryError) as error:
        return Broken(task.case_id, error)
