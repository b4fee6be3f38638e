"""Checkpoints appear whole or not at all, come back bit for bit, and are kept by a plain rule."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import CheckpointConfig, TrainConfig
from lungseg.errors import RunError, StorageError
from lungseg.runs.checkpoint import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoints,
    Entry,
    TrainState,
    arrays,
    assign,
    to_delete,
)
from lungseg.storage import Store, open_store

FIRST = TrainState("a1", 10, 1, "ff", {"model": {"width": 4}}, 0.5, 0, 1.5, {"val_dice": 0.5, "loss": 0.7})
SPECIAL = np.array([np.nan, -0.0, np.inf, 1e-42, 1 / 3], np.float32)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path if request.param == "folder" else request.getfixturevalue("s3_uri"))


@pytest.fixture
def checkpoints(store: Store) -> Checkpoints:
    return Checkpoints(store, "runs/r")


def weights(step: int) -> dict[str, np.ndarray]:
    kernel = np.random.default_rng(step).normal(size=(3, 3, 3, 1, 4)).astype(np.float32)
    return {"unet/conv/kernel": kernel, "unet/conv/bias": SPECIAL}


def optimizer(step: int) -> dict[str, np.ndarray]:
    return {"adamw/iteration": np.array(step, np.int64), "adamw/m": weights(step)["unet/conv/kernel"] ** 2}


def commit(checkpoints: Checkpoints, epoch: int, val_dice: float = 0.5, attempt: str = "a1") -> str:
    metrics = {"val_dice": val_dice}
    state = replace(FIRST, attempt=attempt, step=10 * epoch, epoch=epoch, metrics=metrics)
    return checkpoints.commit(state, weights(epoch), optimizer(epoch))


def damage(store: Store, key: str, how: str) -> None:
    data = bytearray(store.get(key))
    if how == "missing":
        store.delete([key])
    elif how == "truncated":
        store.put(key, bytes(data[:-3]))
    else:
        data[len(data) // 2] ^= 1
        store.put(key, bytes(data))


def test_what_was_committed_comes_back_bit_for_bit(checkpoints: Checkpoints) -> None:
    found = checkpoints.read(checkpoints.commit(FIRST, weights(1), optimizer(1)))
    assert found.state == FIRST
    for saved, read in ((weights(1), found.weights), (optimizer(1), found.optimizer)):
        assert saved.keys() == read.keys()
        for path, array in saved.items():
            assert read[path].dtype == array.dtype
            assert read[path].shape == array.shape
            assert read[path].tobytes() == array.tobytes()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER, STATE, "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken(
    checkpoints: Checkpoints, file: str, how: str
) -> None:
    before, newer = commit(checkpoints, 1), commit(checkpoints, 2)
    damage(checkpoints.store, f"runs/r/checkpoints/{newer}/{file}", how)
    with pytest.raises((RunError, StorageError)) as caught:
        checkpoints.read(newer)
    assert caught.value.code == "object-missing" if how == "missing" else "corrupt" in caught.value.code
    found = checkpoints.newest("a1")
    assert found is not None
    assert found.name == before
    assert found.state.epoch == 1


def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed(tmp_path: Path) -> None:
    checkpoints = Checkpoints(open_store(tmp_path), "runs/r")
    key = f"runs/r/checkpoints/{commit(checkpoints, 1)}/manifest.json"
    whole = checkpoints.store.get(key)
    for position in range(len(whole)):
        # Bit 3 never makes one blank of another, which would mean the same JSON.
        checkpoints.store.put(key, whole[:position] + bytes([whole[position] ^ 8]) + whole[position + 1 :])
        assert checkpoints.newest("a1") is None, position


def test_without_any_valid_checkpoint_there_is_no_newest(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest("a1") is None
    damage(checkpoints.store, f"runs/r/checkpoints/{commit(checkpoints, 1)}/{STATE}", "flipped")
    assert checkpoints.newest("a1") is None


def test_without_its_manifest_a_checkpoint_does_not_exist(checkpoints: Checkpoints) -> None:
    name = commit(checkpoints, 1)
    assert [entry.name for entry in checkpoints.committed("a1")] == [name]
    damage(checkpoints.store, f"runs/r/checkpoints/{name}/manifest.json", "missing")
    assert checkpoints.committed("a1") == []


DYING = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
import numpy as np
from lungseg.config import CheckpointConfig, TrainConfig
from lungseg.storage import FolderStore
from lungseg.runs.checkpoint import Checkpoints
from lungseg.runs.state import TrainState

class Dying(FolderStore):
    left = 1 << 30

    def _tick(self):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def put(self, key, data):
        self._tick()
        super().put(key, data)

    def put_if_absent(self, key, data):
        self._tick()
        return super().put_if_absent(key, data)

    def delete(self, keys):
        for key in keys:
            self._tick()
            super().delete([key])

def epoch(store, number):
    found = Checkpoints(store, "runs/r")
    state = TrainState("a1", number, number, "ff", {}, metrics={"val_dice": number / 10})
    name = found.commit(state, {"w": np.full(9, number)}, {"m": np.full(9, -number)})
    found.publish_best(name, state, b"model %d" % number)
    found.retain("a1", CheckpointConfig(keep_latest=1, keep_best=1))

for moment in range(1, 100):
    store = Dying(Path(sys.argv[1]) / str(moment))
    epoch(store, 1)
    child = os.fork()
    if not child:
        store.left = moment
        epoch(store, 2)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(moment)
"""


def test_a_writer_killed_between_any_two_writes_leaves_a_checkpoint_and_a_best_that_verify(
    tmp_path: Path,
) -> None:
    """The second epoch is written by a process that kills itself before its n-th write, for every n."""
    done = subprocess.run([sys.executable, "-c", DYING, tmp_path], capture_output=True, text=True, check=True)
    moments = int(done.stdout)
    assert moments == 11  # 4 files of the checkpoint, 2 of the best, 4 of the deleted one; and once unharmed
    for moment in range(1, moments + 1):
        checkpoints = Checkpoints(open_store(tmp_path / str(moment)), "runs/r")
        found = checkpoints.newest("a1")
        assert found is not None
        assert found.state.step == (1 if moment <= 4 else 2)
        assert (found.weights["w"] == found.state.step).all()
        assert (found.optimizer["m"] == -found.state.step).all()
        best = checkpoints.read_best()
        assert best.state.step == (1 if moment <= 6 else 2)
        # Killed between its two files, the new network and the old pointer do not fit, which pull notices;
        # the next start publishes both.
        network = checkpoints.store.get("runs/r/best/model.keras")
        assert network == (b"model 1" if moment <= 5 else b"model 2")


def test_two_writers_of_one_step_keep_out_of_each_others_files(checkpoints: Checkpoints) -> None:
    state = replace(FIRST, metrics={"val_dice": 0.1})
    names = [checkpoints.commit(state, weights(i), optimizer(i)) for i in range(5)]
    assert len(set(names)) == 5
    for i, name in enumerate(names):
        np.testing.assert_array_equal(
            checkpoints.read(name).weights["unet/conv/kernel"], weights(i)["unet/conv/kernel"]
        )


def test_attempts_see_their_own_checkpoints_alone_newest_first(checkpoints: Checkpoints) -> None:
    old = commit(checkpoints, 9, attempt="a0")
    mine = [commit(checkpoints, epoch) for epoch in (1, 2, 11)]
    assert [entry.name for entry in checkpoints.committed("a1")] == mine[::-1]
    checkpoints.retain("a1", CheckpointConfig(keep_latest=1, keep_best=1))
    assert [entry.name for entry in checkpoints.committed("a0")] == [old]


def test_retention_deletes_every_file_of_what_it_drops_and_never_the_best(checkpoints: Checkpoints) -> None:
    names = [commit(checkpoints, epoch, dice) for epoch, dice in enumerate((0.1, 0.9, 0.3, 0.8, 0.2), 1)]
    state = replace(FIRST, metrics={"val_dice": 0.3})
    checkpoints.publish_best(names[2], state, b"model")  # as if it were the best over all attempts
    checkpoints.retain("a1", CheckpointConfig(keep_latest=1, keep_best=1))
    kept = [names[1], names[2], names[4]]
    assert [entry.name for entry in checkpoints.committed("a1")] == kept[::-1]
    keys = [item.key for item in checkpoints.store.find("runs/r/checkpoints/")]
    assert sorted({key.split("/")[3] for key in keys}) == kept
    assert checkpoints.read_best().name == names[2]


@settings(deadline=None)
@given(
    dices=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), max_size=12),
    latest=st.integers(1, 4),
    best=st.integers(1, 4),
    data=st.data(),
)
def test_retention_keeps_the_newest_the_best_and_the_pinned_and_nothing_else(
    dices: list[float], latest: int, best: int, data: st.DataObject
) -> None:
    entries = [Entry(f"{step:08d}-x", "a", dice) for step, dice in enumerate(dices)]
    pinned = data.draw(st.sets(st.sampled_from([e.name for e in entries]))) if entries else set()
    config = CheckpointConfig(keep_latest=latest, keep_best=best)
    gone = set(to_delete(data.draw(st.permutations(entries)), config, pinned))
    kept = [entry for entry in entries if entry.name not in gone]
    assert set(entries[-latest:]) <= set(kept)
    assert pinned <= {entry.name for entry in kept}
    for entry in kept:
        better = sum((other.val_dice, other.name) > (entry.val_dice, entry.name) for other in entries)
        assert entry in entries[-latest:] or entry.name in pinned or better < best
    assert sum(e.name not in pinned and e not in entries[-latest:] for e in kept) <= best
    assert len(kept) >= min(len(entries), max(latest, best))
    if dices:
        assert max(e.val_dice for e in kept) == max(dices)


def test_the_best_pointer_names_a_checkpoint_and_the_digest_of_its_model(checkpoints: Checkpoints) -> None:
    assert checkpoints.best() is None
    with pytest.raises(RunError, match="no-checkpoint"):
        checkpoints.read_best()
    name = commit(checkpoints, 3, 0.6)
    state = replace(FIRST, step=30, epoch=3, metrics={"val_dice": 0.6})
    checkpoints.publish_best(name, state, b"model")
    pointer = checkpoints.best()
    assert pointer is not None
    assert (pointer.checkpoint, pointer.epoch, pointer.val_dice) == (name, 3, 0.6)
    # sha256sum of the five bytes
    assert pointer.model_sha256 == "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"
    assert checkpoints.store.get("runs/r/best/model.keras") == b"model"
    best = checkpoints.read_best()
    assert best.name == name
    assert not best.optimizer


@pytest.mark.parametrize("wrong", ["shape", "missing", "more"])
def test_arrays_that_do_not_fit_are_refused_before_any_variable_changes(wrong: str) -> None:
    import keras

    variables = [
        keras.Variable(np.zeros(shape, np.float32), name=name) for name, shape in (("a", 3), ("b", 4))
    ]
    saved = {path: array + 1 for path, array in arrays(variables).items()}
    if wrong == "shape":
        saved["b"] = np.ones(5, np.float32)
    elif wrong == "missing":
        del saved["b"]
    else:
        saved["c"] = np.ones(1, np.float32)
    with pytest.raises(RunError, match="checkpoint-mismatch"):
        assign(variables, saved, "00000010-ab")
    assert not any(array.any() for array in arrays(variables).values())


def test_variables_take_what_fits() -> None:
    import keras

    variables = [
        keras.Variable(np.zeros(shape, np.float32), name=name) for name, shape in (("a", 3), ("b", 4))
    ]
    assign(variables, {"b": np.full(4, 2, np.float32), "a": np.ones(3, np.float32)}, "x")
    assert {path: array.tolist() for path, array in arrays(variables).items()} == {"a": [1] * 3, "b": [2] * 4}


def test_minutes_hold_as_many_epochs_as_fit_if_each_takes_as_long_as_the_latest() -> None:
    config = TrainConfig(max_minutes=1, epochs=10)
    begun = TrainState("a", 0, 0, "", {})
    assert begun.last_epoch(config) == 10
    assert not begun.ended(config)
    for epoch, seconds, last in ((1, 14.9, 4), (3, 35.0, 4), (3, 50.0, 3), (2, 70.0, 2), (2, 1.0, 6)):
        graph_seconds = 30.0 if epoch == 1 else 0.0  # of a worker's first epoch
        latest = {"train_seconds": 10.0 + graph_seconds, "val_seconds": 4.0, "graph_seconds": graph_seconds}
        state = replace(begun, epoch=epoch, seconds=seconds, metrics=latest)
        assert state.last_epoch(config) == last
        assert state.ended(config) == (epoch == last)
        assert not replace(state, losses=[0.1]).ended(config)
