"""A run's name is claimed once, continued on purpose, and pulled only if every byte is right."""

from __future__ import annotations

import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.balls import write_balls

from lungseg.config import Recipe, load_recipe
from lungseg.config.stored import stored_recipe
from lungseg.dataset.manifest import Manifest
from lungseg.errors import ConfigError, DataError, RunError, StorageError
from lungseg.runs.checkpoint import STATE, WEIGHTS, Checkpoints, TrainState
from lungseg.runs.run import list_runs, load_run, load_run_data, open_run, pull_best, refuse_taken
from lungseg.storage import Store, open_store


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "store" if request.param == "folder" else request.getfixturevalue("s3_uri"))


@pytest.fixture
def manifest(store: Store) -> Manifest:
    return write_balls(store, train=6, val=3)


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, ["model.depth=3", *overrides])


def finish_an_epoch(store: Store, name: str, val_dice: float = 0.5) -> str:
    """A committed best checkpoint of a run, as rank 0 leaves it."""
    run, checkpoints = load_run(store, name), Checkpoints(store, f"runs/{name}")
    metrics = {"val_dice": val_dice}
    state = TrainState(run.attempt, 3, 1, run.manifest_sha256, run.recipe, val_dice, 0, 1.0, metrics)
    checkpoint = checkpoints.commit(state, {"w": np.ones(3, np.float32)}, {"m": np.zeros(3, np.float32)})
    checkpoints.publish_best(checkpoint, state, b"a network")
    return checkpoint


def test_a_fresh_name_is_claimed_with_all_that_makes_the_run(store: Store, manifest: Manifest) -> None:
    run = open_run(store, "r", manifest, recipe(), "fresh")
    assert load_run(store, "r") == run
    assert stored_recipe(run.recipe) == recipe()
    assert (run.data, run.manifest_sha256, run.kind) == ("balls", manifest.sha256, "train")
    assert run.versions["tensorflow"].startswith("2.21")


def test_a_taken_name_is_refused_with_the_ways_out(store: Store, manifest: Manifest) -> None:
    refuse_taken(store, "r", "fresh")
    before = open_run(store, "r", manifest, recipe(), "fresh")
    for refused in (
        lambda: open_run(store, "r", manifest, recipe(), "fresh"),
        lambda: refuse_taken(store, "r", "fresh"),
    ):
        with pytest.raises(RunError, match="run-exists") as caught:
            refused()
        assert "--resume" in caught.value.remedy
        assert "--new" in caught.value.remedy
    refuse_taken(store, "r", "resume")
    refuse_taken(store, "r", "new")
    assert load_run(store, "r") == before


def test_resume_keeps_the_attempt_and_may_train_longer_and_otherwise(
    store: Store, manifest: Manifest
) -> None:
    first = open_run(store, "r", manifest, recipe("train.epochs=2"), "resume")  # starts it if need be
    longer = recipe("train.epochs=9", "optimizer.learning_rate=0.01", "train.workers=2")
    resumed = open_run(store, "r", manifest, longer, "resume")
    assert (resumed.attempt, resumed.created) == (first.attempt, first.created)
    assert stored_recipe(load_run(store, "r").recipe) == longer


def test_of_two_commands_that_start_one_name_at_once_exactly_one_gets_it(
    store: Store, manifest: Manifest
) -> None:
    barrier, outcomes = threading.Barrier(2), []

    def start() -> None:
        barrier.wait()
        try:
            outcomes.append(open_run(store, "r", manifest, recipe(), "fresh").attempt)
        except RunError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "run-exists" in outcomes
    assert load_run(store, "r").attempt in outcomes


def test_a_run_that_begins_with_anothers_weights_names_their_checkpoint_and_keeps_to_it(
    store: Store, manifest: Manifest
) -> None:
    with pytest.raises(RunError, match="run-missing"):
        open_run(store, "r", manifest, recipe("train.init_from=teacher"), "fresh")
    open_run(store, "teacher", manifest, recipe(), "fresh")
    with pytest.raises(RunError, match="no-checkpoint"):
        open_run(store, "r", manifest, recipe("train.init_from=teacher"), "fresh")
    taught = finish_an_epoch(store, "teacher")
    with pytest.raises(RunError, match="init-differs") as caught:
        open_run(store, "r", manifest, recipe("train.init_from=teacher", "model.width=4"), "fresh")
    assert "model settings" in caught.value.remedy
    assert not store.exists("runs/r/run.json")
    began = open_run(store, "r", manifest, recipe("train.init_from=teacher"), "fresh")
    assert began.init == f"teacher/{taught}"
    finish_an_epoch(store, "teacher", 0.9)  # which is the teacher's best from now on
    resumed = open_run(store, "r", manifest, recipe("train.init_from=teacher"), "resume")
    assert load_run(store, "r").init == resumed.init == began.init


@pytest.mark.parametrize("what", ["network", "data", "verb", "batch", "seed"])
def test_resume_with_what_does_not_fit_is_refused_and_changes_nothing(
    store: Store, manifest: Manifest, what: str
) -> None:
    before = open_run(store, "r", manifest, recipe(), "fresh")
    other = replace(manifest, sha256="0" * 64) if what == "data" else manifest
    change = {"network": "model.width=8", "batch": "train.global_batch=2", "seed": "train.seed=1"}
    network = recipe(change.get(what, "train.epochs=9"))
    with pytest.raises(RunError, match="run-differs") as caught:
        open_run(store, "r", other, network, "resume", "tune" if what == "verb" else "train")
    assert "--new" in caught.value.remedy
    assert "train.global_batch=4 and train.seed=0" in caught.value.remedy
    assert load_run(store, "r") == before


def test_new_begins_another_attempt_and_keeps_the_best_of_all(store: Store, manifest: Manifest) -> None:
    first = open_run(store, "r", manifest, recipe(), "fresh")
    best = finish_an_epoch(store, "r")
    second = open_run(store, "r", manifest, recipe("model.width=8"), "new")
    assert second.attempt != first.attempt
    checkpoints = Checkpoints(store, "runs/r")
    assert checkpoints.newest(second.attempt) is None
    assert checkpoints.read_best().name == best


@pytest.mark.parametrize(
    ("overrides", "kind", "code", "cure"),
    [
        (["train.global_batch=7"], DataError, "too-few-patches", "train.global_batch"),
        (["model.depth=6"], ConfigError, "patch-shape", "model.depth"),
        (["model.depth=4"], ConfigError, "patch-shape", "model.depth"),  # two slices at the deepest level
        (["augment.crop_zyx=[24,24,24]"], ConfigError, "patch-shape", "augment.crop_zyx"),
        (["augment.crop_zyx=[16,16,12]"], ConfigError, "patch-shape", "augment.turns"),
    ],
)
def test_a_recipe_that_cannot_train_on_the_data_claims_no_name(
    store: Store, manifest: Manifest, overrides: list[str], kind: Any, code: str, cure: str
) -> None:
    with pytest.raises(kind, match=code) as caught:
        open_run(store, "r", manifest, recipe(*overrides), "fresh")
    assert cure in caught.value.remedy
    assert not store.exists("runs/r/run.json")


def test_oblong_slices_cannot_be_turned_and_no_validation_is_no_best(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = write_balls(store, train=6, val=3)
    oblong = replace(manifest, patch_shape_zyx=(16, 16, 8))
    with pytest.raises(ConfigError, match="patch-shape") as caught:
        open_run(store, "r", oblong, recipe(), "fresh")
    assert "augment.turns=false" in caught.value.remedy
    open_run(store, "r", oblong, recipe("augment.turns=false"), "fresh")
    blind = replace(manifest, shards={**manifest.shards, "val": ()})
    with pytest.raises(DataError, match="no-validation") as none:
        open_run(store, "blind", blind, recipe(), "fresh")
    assert "train.publish=last" in none.value.remedy
    open_run(store, "blind", blind, recipe("train.publish=last"), "fresh")
    with pytest.raises(DataError, match="no-validation"):  # a search compares trials by their val Dice
        open_run(store, "search", blind, recipe("train.publish=last"), "fresh", "tune")


def test_what_holds_no_nodule_is_neither_trained_on_nor_chooses_the_best_epoch(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    manifest = write_balls(store, train=6, val=3)
    silent = {
        split: tuple(replace(s, batches=tuple(replace(b, positives=0) for b in s.batches)) for s in shards)
        for split, shards in manifest.shards.items()
    }
    val = replace(manifest, shards={**manifest.shards, "val": silent["val"]})
    with pytest.raises(DataError, match="no-validation: no nodule") as caught:
        open_run(store, "r", val, recipe(), "fresh")
    assert "train.publish=last" in caught.value.remedy
    open_run(store, "r", val, recipe("train.publish=last"), "fresh")
    with pytest.raises(DataError, match="no-validation"):
        open_run(store, "search", val, recipe("train.publish=last"), "fresh", "tune")
    train = replace(manifest, shards={**manifest.shards, "train": silent["train"]})
    with pytest.raises(DataError, match="no-nodules"):
        open_run(store, "s", train, recipe("train.publish=last"), "fresh")


def test_a_missing_run_is_told_with_those_that_exist(store: Store, manifest: Manifest) -> None:
    with pytest.raises(RunError, match="run-missing") as caught:
        load_run(store, "r")
    assert "none" in caught.value.remedy
    open_run(store, "lung-a", manifest, recipe(), "fresh")
    with pytest.raises(RunError, match="run-missing") as caught:
        load_run(store, "r")
    assert "lung-a" in caught.value.remedy


def test_a_run_knows_its_data_and_notices_when_that_is_another(store: Store, manifest: Manifest) -> None:
    open_run(store, "r", manifest, recipe(), "fresh")
    assert load_run_data(store, "r") == manifest
    write_balls(store, train=9, val=3)
    with pytest.raises(RunError, match="data-changed"):
        load_run_data(store, "r")


def test_runs_are_listed_oldest_first_with_their_best(store: Store, manifest: Manifest) -> None:
    assert list_runs(store) == []
    names = ["zeta", "alpha", "mid"]
    for second, name in enumerate(names):
        run = open_run(store, name, manifest, recipe(), "fresh")
        created = f"2026-01-01T00:00:0{second}+00:00"
        store.put_json(f"runs/{name}/run.json", {**asdict(run), "created": created})
    best = finish_an_epoch(store, "mid", 0.75)
    store.put("runs/not-a-run/metrics.jsonl", b"")
    listed = list_runs(store)
    assert [run.name for run, _ in listed] == names
    assert [pointer and (pointer.checkpoint, pointer.val_dice) for _, pointer in listed] == [
        None,
        None,
        (best, 0.75),
    ]


def test_pull_gives_the_best_checkpoint_byte_for_byte(
    store: Store, manifest: Manifest, tmp_path: Path
) -> None:
    open_run(store, "r", manifest, recipe(), "fresh")
    with pytest.raises(RunError, match="no-checkpoint"):
        pull_best(store, "r", tmp_path / "out")
    checkpoint = finish_an_epoch(store, "r")
    pointer = pull_best(store, "r", tmp_path / "out")
    assert pointer.checkpoint == checkpoint
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found.keys() == {"model.keras", WEIGHTS, STATE, "run.json", "best.json"}
    assert found["model.keras"] == b"a network"
    for file in (WEIGHTS, STATE):
        assert found[file] == store.get(f"runs/r/checkpoints/{checkpoint}/{file}")
    for file in ("run.json", "best.json"):
        assert found[file] == store.get(f"runs/r/{file}")


def test_pull_gives_what_fit_post_chose_for_that_checkpoint(
    store: Store, manifest: Manifest, tmp_path: Path
) -> None:
    open_run(store, "r", manifest, recipe(), "fresh")
    checkpoint = finish_an_epoch(store, "r", 0.5)
    store.put(f"runs/r/post/{checkpoint}.json", b"chosen")
    pull_best(store, "r", tmp_path / "out")
    assert (tmp_path / "out/post.json").read_bytes() == b"chosen"
    finish_an_epoch(store, "r", 0.75)
    pull_best(store, "r", tmp_path / "out")
    assert not (tmp_path / "out/post.json").exists()


@pytest.mark.parametrize("broken", ["best/model.keras", WEIGHTS, STATE, "manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_pull_of_broken_bytes_is_refused_and_writes_nothing(
    store: Store, manifest: Manifest, tmp_path: Path, broken: str, how: str
) -> None:
    open_run(store, "r", manifest, recipe(), "fresh")
    checkpoint = finish_an_epoch(store, "r")
    key = f"runs/r/{broken}" if "/" in broken else f"runs/r/checkpoints/{checkpoint}/{broken}"
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    if how == "flipped":
        store.put(key, bytes(data))
    else:
        store.delete([key])
    with pytest.raises((RunError, StorageError), match="corrupt" if how == "flipped" else "object-missing"):
        pull_best(store, "r", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pull_into_a_file_is_an_error_of_the_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    open_run(store, "r", write_balls(store, train=6, val=3), recipe(), "fresh")
    finish_an_epoch(store, "r")
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="output-unwritable"):
        pull_best(store, "r", tmp_path / "out")
