"""Prepare: the same data set bit by bit in whatever order, on whatever store, and after whatever death."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from unpacked import unpacked

from lungseg.config import DataConfig, PairsConfig, PatchConfig, ShardConfig
from lungseg.data import pairs, shards
from lungseg.data.case import LabelledScan, Nodule
from lungseg.data.prepare import _scan_task, _shard_task, cut_patches, plan_shards, prepare, to_grid
from lungseg.data.volume import Geometry, Volume
from lungseg.data.volumes import read_volume
from lungseg.errors import DataError
from lungseg.storage import Store, open_store

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
TREE: dict[str, Any] = {
    "split": {"val": 0.25, "test": 0.25, "seed": 2},  # which deals four patients out as 2, 1 and 1
    "patch": {"shape_zyx": [16, 16, 16]},
    "shard": {"target_mib": 1},
}
CONFIG = DataConfig.model_validate(TREE)


def quiet(done: int, total: int) -> None:
    pass


def ball(geometry: Geometry, centre_mm: tuple[float, ...], radius_mm: float) -> np.ndarray:
    place = geometry.to_lps_mm(np.stack(np.indices(geometry.shape_zyx), axis=-1))
    return (np.linalg.norm(place - centre_mm, axis=-1) <= radius_mm).astype(np.uint8)


def write_pairs(folder: Path, count: int, shape: tuple[int, int, int] = (14, 30, 24)) -> list[pairs.PairCase]:
    """`count` scans of blobs, two of each patient, at (2.0, 1.0, 1.5) mm."""
    rng = np.random.default_rng(0)
    grid = Geometry(shape, (2.0, 1.0, 1.5), (-10.0, 5.0, 100.0), AXIAL)
    reach = np.multiply(shape, grid.spacing_mm)[::-1]
    names = [f"MUSTER^ERIKA^{number:02d}" for number in range(count)]
    for name in names:
        mask = np.zeros(shape, np.uint8)
        for _ in range(2):
            centre = grid.origin_lps_mm + rng.uniform(0.2, 0.8, 3) * reach
            mask |= ball(grid, tuple(centre), rng.uniform(2.5, 4.5))
        hu = rng.normal(-800, 80, shape) + 850.0 * mask
        hu[:, : shape[1] // 3] = rng.normal(30, 20, hu[:, : shape[1] // 3].shape)
        for kind, array in (("images", hu.astype(np.int16)), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            image = sitk.GetImageFromArray(array)
            image.SetSpacing(grid.spacing_mm[::-1])
            image.SetOrigin(grid.origin_lps_mm)
            sitk.WriteImage(image, str(folder / kind / f"{name}.nii.gz"))
    with (folder / "patients.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["name", "patient"], *([n, f"MUSTER^ERIKA-{i // 2}"] for i, n in enumerate(names))]
        )
    return pairs.find_cases(folder, PairsConfig())


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[pairs.PairCase]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8)


@pytest.fixture(scope="module")
def prepared(
    ray_cluster: object, tmp_path_factory: pytest.TempPathFactory, cases: list[pairs.PairCase]
) -> tuple[Store, shards.Manifest]:
    store = open_store(tmp_path_factory.mktemp("store"))
    return store, prepare(store, "d", cases, CONFIG, quiet)


def contents(store: Store) -> dict[str, bytes]:
    return {item.key: store.get(item.key) for item in store.find()}


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def all_patches(store: Store, manifest: shards.Manifest, split: str) -> list[shards.Patch]:
    return [
        patch
        for shard in manifest.shards[split]
        for number in range(len(shard.batches))
        for patch in shards.patches_of(
            shards.fetch(store, shards.Extent(shard, number, number + 1)),
            manifest.patch_shape_zyx,
            shard.codec,
        )
    ]


def test_the_order_of_the_cases_and_the_kind_of_store_change_no_byte(
    prepared: tuple[Store, shards.Manifest], cases: list[pairs.PairCase], s3_uri: str
) -> None:
    other = open_store(s3_uri)
    shuffled = [cases[i] for i in (5, 0, 7, 2, 1, 6, 4, 3)]
    calls: list[tuple[int, int]] = []
    manifest = prepare(other, "d", shuffled, CONFIG, lambda done, total: calls.append((done, total)))
    assert manifest == prepared[1]
    assert contents(other) == contents(prepared[0])
    assert (calls[0], calls[-1]) == ((0, 8), (8, 8))


def test_the_store_holds_what_the_manifest_names_and_nothing_else(
    prepared: tuple[Store, shards.Manifest],
) -> None:
    store, manifest = prepared
    named = [shard for split in manifest.shards.values() for shard in split]
    named_keys = {one.key for one in [*named, *manifest.volumes["val"], *manifest.volumes["test"]]}
    assert {item.key for item in store.find()} == named_keys | {"data/d/manifest.json"}
    assert {split: len(ids) for split, ids in manifest.cases.items()} == {"train": 4, "val": 2, "test": 2}
    assert len(manifest.shards["train"]) >= 1
    assert "test" not in manifest.shards
    for split in ("val", "test"):
        assert tuple(entry.case_id for entry in manifest.volumes[split]) == manifest.cases[split]
        for entry in manifest.volumes[split]:
            stored = read_volume(store, entry)
            assert stored.volume.geometry.spacing_mm == (1.0, 1.0, 1.0)
            assert stored.mask.shape == stored.volume.volume_hu.shape == (28, 30, 36)


def test_every_patch_is_in_the_shards_once_with_its_case_and_its_count(
    prepared: tuple[Store, shards.Manifest], cases: list[pairs.PairCase]
) -> None:
    store, manifest = prepared
    for split in ("train", "val"):
        found = all_patches(store, manifest, split)
        wanted = []
        for case in cases:
            if case.case_id in manifest.cases[split]:
                scan = case.load()
                wanted += cut_patches(case.case_id, scan, *to_grid(scan, CONFIG.spacing_mm), CONFIG.patch)
        assert Counter(map(digest, found)) == Counter(map(digest, wanted))
        strata = Counter(patch.stratum for patch in wanted)
        counts = {"scans": len(manifest.cases[split]), "patches": len(found), **strata}
        assert manifest.counts[split] == counts | {"nodules": strata["nodule"] // 4}
        assert all((patch.mask == 1).any() for patch in found if patch.stratum == "nodule")


def digest(patch: shards.Patch) -> tuple[object, ...]:
    return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in vars(patch).values())


def test_names_of_files_and_patients_appear_in_no_key_and_no_object(
    prepared: tuple[Store, shards.Manifest], cases: list[pairs.PairCase]
) -> None:
    ids = 0
    for key, data in contents(prepared[0]).items():
        for text in unpacked(key, data):
            assert b"MUSTER" not in text, key
            assert str(cases[0].image.parent).encode() not in text, key
            ids += cases[0].case_id.encode() in text
    assert ids  # this search finds what is there


def test_a_second_prepare_reuses_and_other_settings_or_splits_are_refused(
    prepared: tuple[Store, shards.Manifest], cases: list[pairs.PairCase]
) -> None:
    store, manifest = prepared
    before = times(Path(store.uri))
    assert prepare(store, "d", cases, CONFIG, quiet) == manifest
    moved = [replace(case, patient_id="one patient") for case in cases]
    others: list[tuple[list[pairs.PairCase], dict[str, Any]]] = [
        (cases, TREE | {"spacing_mm": [2, 1, 1]}),
        (cases, TREE | {"shard": {"target_mib": 2}}),
        (cases[1:], TREE),
        (moved, TREE),
    ]
    for other, tree in others:
        with pytest.raises(DataError, match="data-exists") as caught:
            prepare(store, "d", other, DataConfig.model_validate(tree), quiet)
        assert caught.value.where["data"] == "d"
    assert times(Path(store.uri)) == before


def test_what_a_killed_job_with_other_settings_left_is_swept_away(
    prepared: tuple[Store, shards.Manifest], cases: list[pairs.PairCase], tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    for key in ("work/x.json", "work/x.arrow", "shards/train-00077.arrow", "volumes/val/old.arrow"):
        store.put(f"data/d/{key}", b"stale")
    scan = _scan_task(store, "d", cases[0], "val", CONFIG.model_copy(update={"spacing_mm": (2.0, 1.0, 1.0)}))
    assert scan.work is not None
    assert store.exists(scan.work.key)
    prepare(store, "d", cases, CONFIG, quiet)
    assert contents(store) == contents(prepared[0])


def test_a_scan_that_cannot_be_read_ends_in_its_own_error_and_no_manifest(
    ray_cluster: object, tmp_path: Path
) -> None:
    broken = write_pairs(tmp_path / "pairs", 3)
    image = broken[1].image
    image.write_bytes(image.read_bytes()[:-200])
    store = open_store(tmp_path / "store")
    with pytest.raises(DataError) as caught:
        prepare(store, "d", broken, CONFIG, quiet)
    assert caught.value.code == "image-unreadable"
    assert type(caught.value) is DataError
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not store.exists("data/d/manifest.json")


def test_a_file_of_splits_is_followed(cases: list[pairs.PairCase], tmp_path: Path) -> None:
    (tmp_path / "splits.csv").write_text("patient,split\nMUSTER^ERIKA-0,val\n")
    config = DataConfig.model_validate({"split": {"file": tmp_path / "splits.csv"}})
    with pytest.raises(DataError, match=r"split-incomplete: 3 of 4 patients.*MUSTER\^ERIKA-1"):
        prepare(open_store(tmp_path / "store"), "d", cases, config, quiet)
    assert not (tmp_path / "store" / "data").exists()


def test_no_scans_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cases-none"):
        prepare(open_store(tmp_path), "d", [], CONFIG, quiet)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_died_and_gives_the_same_data_set(
    ray_cluster: object, tmp_path: Path
) -> None:
    many = write_pairs(tmp_path / "pairs", 24, (40, 80, 60))
    undisturbed = open_store(tmp_path / "undisturbed")
    prepare(undisturbed, "d", many, CONFIG, quiet)
    store = open_store(tmp_path / "killed")
    work = tmp_path / "killed/data/d/work"

    command = [sys.executable, "-m", "lungseg.cli", "prepare", "pairs", str(tmp_path / "pairs")]
    command += ["--store", store.uri, "--data", "d", "--set", "data.split={val: 0.25, test: 0.25, seed: 2}"]
    command += ["--set", "data.patch.shape_zyx=[16, 16, 16]", "--set", "data.shard.target_mib=1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 100
        while not list(work.glob("*.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(2)  # Ray's own processes follow their driver
    done = {path.stem.rpartition("-")[0] for path in work.glob("*.json")}
    assert 0 < len(done) < 24
    assert not store.exists("data/d/manifest.json")

    for case in many:
        if case.case_id in done:
            case.image.unlink()  # what is done must not be read again
    prepare(store, "d", many, CONFIG, quiet)
    assert contents(store) == contents(undisturbed)


def test_a_shard_that_a_killed_job_finished_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that Ray runs, without Ray: what matters is what it finds in the store."""
    store = open_store(tmp_path)
    scan = labelled((40, 40, 40), (1.0, 1.0, 1.0))
    stored, ignore = to_grid(scan, (1.0, 1.0, 1.0))
    cut = cut_patches("c", scan, stored, ignore, CONFIG.patch)
    work = shards.write_shard(store, "work", ([one] for one in cut), CONFIG.patch.shape_zyx, "lz4")
    plan = [[("c", 0), ("c", 2)], [("c", 1)]]

    def make(plan: list[list[tuple[str, int]]], config: DataConfig = CONFIG) -> shards.Shard:
        return _shard_task(store, "data/d", "train-00000", plan, {"c": work}, config)

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


def test_jobs_of_other_settings_under_one_name_write_other_objects(
    cases: list[pairs.PairCase], tmp_path: Path
) -> None:
    """What the second writes leaves the bytes of the first as they were."""
    store = open_store(tmp_path)
    coarser = CONFIG.model_copy(update={"spacing_mm": (1.0, 1.0, 1.1)})
    ours, before = _scan_task(store, "d", cases[0], "val", CONFIG), contents(store)
    theirs = _scan_task(store, "d", cases[0], "val", coarser)
    assert {key: store.get(key) for key in before} == before
    assert ours.work and theirs.work and ours.volume and theirs.volume  # noqa: PT018
    assert len({one.key for one in (ours.work, theirs.work, ours.volume, theirs.volume)}) == 4


def test_of_two_jobs_at_once_one_owns_the_name_and_its_data_set_is_whole(
    prepared: tuple[Store, shards.Manifest], cases: list[pairs.PairCase], tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    other = CONFIG.model_copy(update={"spacing_mm": (1.0, 1.0, 1.1)})

    def job(config: DataConfig) -> shards.Manifest | DataError:
        try:
            return prepare(store, "d", cases, config, quiet)
        except DataError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(job, (CONFIG, other, CONFIG)))
    lost = [one for one in results if isinstance(one, DataError)]
    assert [error.code for error in lost] == ["data-exists"] * len(lost)
    assert len(lost) in (1, 2)
    manifest = shards.load_manifest(store, "d")
    assert all(one == manifest for one in results if not isinstance(one, DataError))
    for split in ("train", "val"):
        assert len(all_patches(store, manifest, split)) == manifest.counts[split]["patches"]
    for split in ("val", "test"):
        assert all(read_volume(store, entry) for entry in manifest.volumes[split])
    if len(lost) == 1:
        assert manifest == prepared[1]


def labelled(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> LabelledScan:
    """A ball of 6 mm radius as nodule, one of 5 mm beside it to be ignored, where the two overlap both."""
    grid = Geometry(shape, spacing_mm, (-30.0, 12.5, -400.0), AXIAL)
    centre = grid.to_lps_mm(np.subtract(shape, 1) / 2)
    mask, ignore = ball(grid, tuple(centre), 6), ball(grid, (*(centre[:2] + 7), centre[2]), 5)
    hu = np.full(shape, -800, np.int16)
    hu[mask == 1] = 50
    x, y, z = centre.tolist()
    return LabelledScan(Volume(hu, grid), mask, ignore, (Nodule("n1", (x, y, z), 12.0, 4),))


@pytest.mark.parametrize("spacing_mm", [(2.5, 0.7, 0.7), (1.25, 0.6, 0.6), (1.0, 1.0, 1.0), (0.5, 0.9, 1.3)])
def test_resampling_keeps_the_volume_of_a_ball(spacing_mm: tuple[float, float, float]) -> None:
    shape = tuple(math.ceil(40 / step) for step in spacing_mm)
    scan = labelled(shape, spacing_mm)  # type: ignore[arg-type]
    stored, _ = to_grid(scan, (1.0, 1.0, 1.0))
    drawn_mm3 = scan.mask.sum() * math.prod(spacing_mm)
    assert (stored.mask == 1).sum() == pytest.approx(drawn_mm3, rel=0.03)
    index = stored.volume.geometry.to_lps_mm(np.argwhere(stored.mask == 1).mean(axis=0))
    assert index == pytest.approx(scan.nodules[0].centre_lps_mm, abs=0.15)


def test_ignore_regions_are_255_and_never_on_a_nodule() -> None:
    scan = labelled((20, 40, 40), (2.0, 1.0, 1.0))
    assert (scan.mask & scan.ignore).any()
    stored, ignore = to_grid(scan, (2.0, 1.0, 1.0))
    np.testing.assert_array_equal(stored.mask == 1, scan.mask == 1)
    np.testing.assert_array_equal(stored.mask == 255, (scan.ignore == 1) & (scan.mask == 0))
    np.testing.assert_array_equal(ignore, stored.mask == 255)
    found = cut_patches("c", scan, stored, ignore, PatchConfig(shape_zyx=(16, 16, 16)))
    assert {patch.stratum for patch in found if (patch.mask != 0).any()} == {"nodule"}
    assert any((patch.mask == shards.IGNORE).any() for patch in found)


def test_a_crop_smaller_than_a_patch_is_filled_with_air() -> None:
    scan = labelled((9, 20, 15), (1.0, 1.0, 1.0))
    stored, ignore = to_grid(scan, (1.0, 1.0, 1.0))
    found = cut_patches("c", scan, stored, ignore, PatchConfig(shape_zyx=(32, 32, 32), jitter=0.0))
    assert [patch.stratum for patch in found] == ["nodule"] * 4
    for patch in found:
        assert patch.image_hu.shape == patch.mask.shape == (32, 32, 32)
        assert (patch.image_hu == -1024).sum() == 32**3 - 9 * 20 * 15
        assert (patch.mask == 1).sum() == scan.mask.sum()
        assert patch.centre_lps_mm == pytest.approx(scan.nodules[0].centre_lps_mm, abs=0.51)


names = st.text("abcdef0123456789-", min_size=1, max_size=6)


@given(
    st.dictionaries(st.tuples(names, st.integers(0, 99)), st.booleans(), max_size=120),
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(0, 2**63 - 1),
    st.randoms(),
)
@settings(deadline=None)
def test_a_plan_places_every_row_once_with_positives_spread_evenly(
    strata, per_batch, per_shard, seed, random
):
    rows = [(case, row, positive) for (case, row), positive in strata.items()]
    plan = plan_shards(rows, per_batch, per_shard, seed)
    batches = [batch for shard in plan for batch in shard]
    placed = [place for batch in batches for place in batch]
    assert sorted(placed) == sorted(strata)
    assert all(len(batch) == per_batch for batch in batches[:-1])
    assert all(len(shard) == per_shard for shard in plan[:-1])
    assert all(shard and all(shard) for shard in plan)
    # This is what `order` builds on: one class or two of record batches, but for a ragged last one.
    assert len({sum(strata[place] for place in batch) for batch in batches[:-1]}) <= 2
    fair = sum(strata.values()) / max(1, len(rows))
    for batch in batches:
        assert abs(sum(strata[place] for place in batch) - fair * len(batch)) <= 1
    random.shuffle(rows)
    assert plan_shards(rows, per_batch, per_shard, seed) == plan


def test_a_plan_mixes_scans_and_differs_by_seed():
    rows = [(f"c{case}", row, row < 4) for case in range(20) for row in range(16)]
    batches = [batch for shard in plan_shards(rows, 4, 100, 0) for batch in shard]
    assert np.mean([len({case for case, _ in batch}) for batch in batches]) > 3.5
    assert plan_shards(rows, 4, 100, 1) != plan_shards(rows, 4, 100, 0)
