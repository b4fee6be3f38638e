"""Checkpoints in the store: immutable, committed by a manifest, restored only if every byte verifies.

Weights are safetensors files (nothing is unpickled); a model is rebuilt from its recipe and then given
verified weights. This module needs no TensorFlow, so `runs` and `pull` answer at once.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from lungseg.config import CheckpointConfig
from lungseg.errors import LungsegError, RunError
from lungseg.runs.best import Best
from lungseg.runs.state import TrainState, rank, validated
from lungseg.storage import Store, keys, to_json
from lungseg.telemetry import count_checkpoint, log

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
UNUSABLE = ("checkpoint-corrupt", "object-missing", "object-corrupt", "object-truncated")
"""Codes of errors that speak against one checkpoint, and not against the store."""
_log = log("checkpoint")


@dataclass(frozen=True)
class Entry:
    """What a checkpoint's manifest says of it."""

    name: str
    attempt: str
    val_dice: float | None
    claim: int = 0

    @property
    def age(self) -> tuple[int, str]:
        """Sorts by claim, then by step: a run that was taken over goes on from before its last steps."""
        return self.claim, self.name


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: arrays by variable path.

    `weights` are what is validated, pulled and used; `optimizer` is all else that is needed to go on, and
    empty where training begins with these weights.
    """

    name: str
    state: TrainState
    weights: Mapping[str, np.ndarray]
    optimizer: Mapping[str, np.ndarray]


class Checkpoints:
    """The checkpoints below `root` (for example "runs/first")."""

    def __init__(self, store: Store, root: str) -> None:
        self.store, self.root = store, root

    def commit(
        self, state: TrainState, weights: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]
    ) -> str:
        """Write all files, then the manifest that makes them a checkpoint; returns its name.

        The random part of the name keeps two writers of one run out of each other's files.
        """
        began = time.monotonic()
        name = f"{state.step:08d}-{secrets.token_hex(4)}"
        files = {
            WEIGHTS: safetensors_save(dict(weights)),
            OPTIMIZER: safetensors_save(dict(optimizer)),
            STATE: to_json(asdict(state)),
        }
        for file, data in files.items():
            self.store.put(keys.checkpoint(self.root, name, file), data)
        entries = {f: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for f, d in files.items()}
        body = {"attempt": state.attempt, "claim": state.claim, "val_dice": state.val_dice, "files": entries}
        manifest = to_json({**body, "sha256": _digest(body)})
        if not self.store.put_if_absent(keys.checkpoint_manifest(self.root, name), manifest):
            raise RunError("checkpoint-exists", checkpoint=name, remedy="start the run again with --resume")
        count_checkpoint(time.monotonic() - began, sum(map(len, files.values())))
        return name

    def committed(self, attempt: str) -> list[Entry]:
        """Committed checkpoints of an attempt, newest first; what lacks a manifest does not exist."""
        found = (item.key for item in self.store.find(keys.checkpoints(self.root)))
        entries = []
        for name in filter(None, (keys.checkpoint_of(self.root, key) for key in found)):
            try:
                manifest = self._manifest(name)
            except LungsegError as error:
                if error.code not in UNUSABLE:
                    raise
                _log.warning("checkpoint %s has no readable manifest: %s", name, error)
            else:
                entries.append(
                    Entry(
                        name, manifest["attempt"], validated(manifest["val_dice"]), manifest.get("claim", 0)
                    )
                )
        mine = [entry for entry in entries if entry.attempt == attempt]
        return sorted(mine, key=lambda entry: entry.age, reverse=True)

    def read(self, name: str, *, with_optimizer: bool = True) -> Checkpoint:
        """Raises what `files` raises."""
        files = self.files(name, (WEIGHTS, OPTIMIZER, STATE) if with_optimizer else (WEIGHTS, STATE))
        state = TrainState.from_json(json.loads(files[STATE]))
        optimizer = safetensors_load(files[OPTIMIZER]) if with_optimizer else {}
        return Checkpoint(name, state, safetensors_load(files[WEIGHTS]), optimizer)

    def files(self, name: str, wanted: Sequence[str]) -> dict[str, bytes]:
        """Raises RunError("checkpoint-corrupt") if a byte differs from what was committed, and
        StorageError("object-missing" or "object-corrupt")."""
        entries, files = self._manifest(name)["files"], {}
        for file in wanted:
            files[file] = self.store.get(keys.checkpoint(self.root, name, file))
            if hashlib.sha256(files[file]).hexdigest() != entries[file]["sha256"]:
                raise _corrupt(name, file)
        return files

    def newest(self, attempt: str) -> Checkpoint | None:
        """The newest checkpoint of this attempt that verifies; broken ones are named in the log."""
        for entry in self.committed(attempt):
            try:
                return self.read(entry.name)
            except LungsegError as error:
                if error.code not in UNUSABLE:
                    raise
                _log.warning("checkpoint %s is not usable, trying the one before: %s", entry.name, error)
        return None

    def retain(self, attempt: str, config: CheckpointConfig) -> None:
        """Delete what `to_delete` names; manifests go first, so a killed deletion leaves no half one."""
        best = self.best()
        pinned = [best.checkpoint] if best else []
        for name in to_delete(self.committed(attempt), config, pinned):
            manifest = keys.checkpoint_manifest(self.root, name)
            found = [item.key for item in self.store.find(keys.checkpoint(self.root, name))]
            self.store.delete(sorted(found, key=lambda key: key != manifest))

    def best(self) -> Best | None:
        """The pointer to the published checkpoint, or None before the first."""
        key = keys.best(self.root)
        if not self.store.exists(key):
            return None
        tree = self.store.get_json(key)
        if "manifest_sha256" not in tree:  # format 1: the checkpoint itself knows
            tree["manifest_sha256"] = self.state(tree["checkpoint"]).manifest_sha256
        return Best.from_json(tree)

    def publish_best(self, name: str, state: TrainState, model_keras: bytes) -> None:
        """Point best.json at a committed checkpoint, after its model.keras is in place."""
        self.store.put(keys.best_model(self.root), model_keras)
        self.store.put_json(keys.best(self.root), asdict(Best.of(name, state, model_keras)))

    def require_best(self) -> Best:
        """As `best`. Raises RunError("no-checkpoint") before the first."""
        pointer = self.best()
        if pointer is None:
            remedy = "let the run finish an epoch first"
            raise RunError("no-checkpoint", store=self.store.uri, run=self.root, remedy=remedy)
        return pointer

    def read_best(self) -> Checkpoint:
        """The best checkpoint, without its optimiser. Raises RunError("no-checkpoint")."""
        return self.read(self.require_best().checkpoint, with_optimizer=False)

    def state(self, name: str) -> TrainState:
        """Raises what `files` raises."""
        return TrainState.from_json(json.loads(self.files(name, (STATE,))[STATE]))

    def _manifest(self, name: str) -> dict[str, Any]:
        """A checkpoint's manifest, which carries its own digest: a flipped bit in it is no other score."""
        manifest = self.store.get_json(keys.checkpoint_manifest(self.root, name))
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.get("sha256") != _digest(body):
            raise _corrupt(name, "manifest.json")
        return body


def to_delete(entries: Sequence[Entry], config: CheckpointConfig, pinned: Iterable[str] = ()) -> list[str]:
    """All but the newest `keep_latest`, the `keep_best` of highest validation Dice and the pinned.

    Of equal scores the newer is kept.
    """
    names = [entry.name for entry in sorted(entries, key=lambda e: e.age)]
    ranked = [e.name for e in sorted(entries, key=lambda e: (rank(e.val_dice), e.age))]
    keep = {*names[-config.keep_latest :], *ranked[-config.keep_best :], *pinned}
    return [name for name in names if name not in keep]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(body)).hexdigest()


def _corrupt(name: str, file: str) -> RunError:
    remedy = "use an older checkpoint: --resume takes the newest that verifies"
    return RunError("checkpoint-corrupt", checkpoint=name, file=file, remedy=remedy)


def arrays(variables: Iterable[Any]) -> dict[str, np.ndarray]:
    """Variables of a Keras model or optimiser by path, copied to the host."""
    return {variable.path: np.asarray(variable.numpy()) for variable in variables}


def assign(variables: Iterable[Any], saved: Mapping[str, np.ndarray], checkpoint: str) -> None:
    """Give variables their saved values. Raises RunError("checkpoint-mismatch") before touching any."""
    variables = list(variables)
    shapes = {variable.path: tuple(variable.shape) for variable in variables}
    if shapes != {path: array.shape for path, array in saved.items()}:
        remedy = "use the recipe it was trained with, or start anew with --new"
        raise RunError("checkpoint-mismatch", checkpoint=checkpoint, remedy=remedy)
    for variable in variables:
        variable.assign(saved[variable.path])
