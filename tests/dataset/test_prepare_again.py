"""What prepare does not do twice: after a death, with other settings, with more scans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.painted import CONFIG, TREE, contents, labelled, of_data_sets, quiet, times, write_pairs

from lungseg.cluster import run_tasks
from lungseg.config import DataConfig, ShardConfig, SplitConfig
from lungseg.dataset import shards
from lungseg.dataset.cutting import cut_patches, to_grid
from lungseg.dataset.prepare import _shard_task, prepare
from lungseg.errors import DataError
from lungseg.storage import open_store


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_died_and_gives_the_same_data_set(
    ray_cluster: object, tmp_path: Path
) -> None:
    many = write_pairs(tmp_path / "pairs", 24, (40, 80, 60))
    undisturbed = open_store(tmp_path / "undisturbed")
    prepare(undisturbed, "d", many, CONFIG, quiet)
    store = open_store(tmp_path / "killed")
    kept = tmp_path / "killed/scans"

    command = [sys.executable, "-m", "lungseg.cli", "prepare", "pairs", str(tmp_path / "pairs")]
    command += ["--store", store.uri, "--data", "d", "--set", "data.split={val: 0.25, test: 0.25, seed: 2}"]
    command += ["--set", "data.patch.shape_zyx=[16, 16, 16]", "--set", "data.shard.target_mib=1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while not list(kept.glob("*.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(2)  # Ray's own processes follow their driver
    done = {path.stem.rpartition("-")[0] for path in kept.glob("*.json")}
    assert 0 < len(done) < 24
    assert not store.exists("data/d/manifest.json")

    for case in many:
        if case.case_id in done:
            spoil(case.image)  # what is done must not be read again
    prepare(store, "d", many, CONFIG, quiet)
    assert contents(store) == contents(undisturbed)


def spoil(file: Path) -> None:
    """Other bytes, which nobody who only looks at the file's size and time will notice."""
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "read_again"),
    [
        ({"shard": {"target_mib": 1, "rows_per_batch": 3}}, set()),
        ({"split": {"val": 0.25, "test": 0.25, "seed": 2, "folds": 2}}, {"val", "test"}),
        ({"spacing_mm": [1.0, 1.0, 1.1]}, {"train", "val", "test"}),
    ],
)
def test_another_setting_reads_again_only_what_depends_on_it(
    ray_cluster: object, tmp_path: Path, change: dict[str, Any], read_again: set[str]
) -> None:
    """Only the scans of `read_again` can be read by then: those that are held out for the first time."""
    cases = write_pairs(tmp_path / "pairs", 8)
    store = open_store(tmp_path / "store")
    config = DataConfig.model_validate(TREE | change)
    fresh = prepare(open_store(tmp_path / "fresh"), "other", cases, config, quiet)
    before = prepare(store, "d", cases, CONFIG, quiet).held_out
    had = {entry.case_id for split in before.values() for entry in split}
    needed = {case for split in read_again for case in fresh.cases[split]}
    if "train" not in read_again:
        needed -= had
    for case in cases:
        if case.case_id not in needed:
            spoil(case.image)
    assert 0 < len(needed) < 8 or read_again != {"val", "test"}
    assert prepare(store, "other", cases, config, quiet) == fresh


def test_more_scans_read_only_those_that_are_new(ray_cluster: object, tmp_path: Path) -> None:
    cases = write_pairs(tmp_path / "pairs", 8)
    store = open_store(tmp_path / "store")
    config = CONFIG.model_copy(update={"split": SplitConfig(val=0.0, test=0.0)})
    prepare(store, "few", cases[:5], config, quiet)
    for case in cases[:5]:
        spoil(case.image)
    assert prepare(store, "all", cases, config, quiet).counts["train"]["scans"] == 8


def test_a_scan_whose_file_has_changed_is_read_again(ray_cluster: object, tmp_path: Path) -> None:
    cases = write_pairs(tmp_path / "pairs", 4)
    store = open_store(tmp_path / "store")
    first = prepare(store, "d", cases, CONFIG, quiet)
    cases[1].mask.write_bytes(cases[2].mask.read_bytes())
    second = prepare(store, "mended", cases, CONFIG, quiet)
    changed = {case for case in first.scans if first.scans[case] != second.scans[case]}
    assert changed == {cases[1].case_id}


def test_a_changed_mask_under_the_same_name_is_refused_and_harms_nothing(
    ray_cluster: object, tmp_path: Path
) -> None:
    """Of a scan that is held out, whose whole volume lies in the data set too."""
    cases = write_pairs(tmp_path / "pairs", 8)
    store = open_store(tmp_path / "store")
    first = prepare(store, "d", cases, CONFIG, quiet)
    before = of_data_sets(store)
    held_out = next(case for case in cases if case.case_id in first.cases["test"])
    other = next(case for case in cases if case is not held_out)
    held_out.mask.write_bytes(other.mask.read_bytes())
    with pytest.raises(DataError, match="data-exists: 1 of its scans or masks") as caught:
        prepare(store, "d", cases, CONFIG, quiet)
    assert held_out.case_id in str(caught.value)
    assert "--data" in caught.value.remedy
    assert of_data_sets(store) == before
    assert prepare(store, "mended", cases, CONFIG, quiet).scans != first.scans


def test_the_same_scans_copied_elsewhere_are_the_same_data_set(ray_cluster: object, tmp_path: Path) -> None:
    cases = write_pairs(tmp_path / "pairs", 4)
    store = open_store(tmp_path / "store")
    first = prepare(store, "d", cases, CONFIG, quiet)
    for case in cases:
        os.utime(case.mask)  # as a copy has
    assert prepare(store, "d", cases, CONFIG, quiet) == first


def test_a_node_works_on_no_more_scans_at_once_than_its_memory_holds(ray_cluster: Any) -> None:
    (whole,) = {node["Resources"]["memory"] for node in ray_cluster.nodes() if node["Alive"]}

    def work(number: int) -> tuple[float, float]:
        began = time.time()
        time.sleep(0.5)
        return began, time.time()

    def at_once(memory_bytes: float) -> bool:
        spans = sorted(run_tasks(work, [(0,), (1,), (2,)], int(memory_bytes)))
        return any(begin < end for (_, end), (begin, _) in pairwise(spans))

    assert at_once(1)
    assert not at_once(0.6 * whole)
    assert not at_once(5 * whole)  # more than there is: one at a time, and not none for ever


def test_a_shard_that_a_killed_job_finished_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that Ray runs, without Ray: what matters is what it finds in the store."""
    store = open_store(tmp_path)
    scan = labelled((40, 40, 40), (1.0, 1.0, 1.0))
    stored = to_grid(scan, (1.0, 1.0, 1.0))
    cut = cut_patches("c", scan, stored, CONFIG.patch)
    work = shards.write_shard(store, "work", ([one] for one in cut), CONFIG.patch.shape_zyx, "lz4")
    plan = [[("c", 0), ("c", 2)], [("c", 1)]]

    def make(plan: list[list[tuple[str, int]]], config: DataConfig = CONFIG) -> shards.Shard:
        return _shard_task(store, "d", "train-00000", plan, {"c": work}, config)

    first = make(plan)
    before = times(tmp_path)
    assert make(plan) == first
    assert times(tmp_path) == before
    # Other patches or another codec are another object; a shard that is gone is written again.
    others = [
        make(plan[::-1]),
        make(plan, CONFIG.model_copy(update={"shard": ShardConfig(codec="raw")})),
    ]
    assert len({one.key for one in [first, *others]}) == 3
    assert others[1].codec == "raw"
    store.delete([first.key])
    assert make(plan) == first
    assert store.size(first.key) == first.bytes
