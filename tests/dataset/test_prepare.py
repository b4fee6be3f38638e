"""Prepare: the same data set bit by bit in whatever order, on whatever store, and after whatever death."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.painted import CONFIG, TREE, contents, of_data_sets, quiet, times, write_pairs
from helpers.unpacked import unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.config import DataConfig
from lungseg.dataset import shards
from lungseg.dataset.card import describe
from lungseg.dataset.cutting import cut_patches, prepare_scan, to_grid
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.plan import plan_shards
from lungseg.dataset.prepare import prepare
from lungseg.dataset.stored_scans import read_scan
from lungseg.errors import DataError
from lungseg.sources import pairs
from lungseg.storage import Store, open_store


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[pairs.PairCase]:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8)


@pytest.fixture(scope="module")
def prepared(
    ray_cluster: object, tmp_path_factory: pytest.TempPathFactory, cases: list[pairs.PairCase]
) -> tuple[Store, Manifest]:
    store = open_store(tmp_path_factory.mktemp("store"))
    return store, prepare(store, "d", cases, CONFIG, quiet)


def all_patches(store: Store, manifest: Manifest, split: str) -> list[shards.Patch]:
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
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase], s3_uri: str
) -> None:
    other = open_store(s3_uri)
    shuffled = [cases[i] for i in (5, 0, 7, 2, 1, 6, 4, 3)]
    calls: list[tuple[int, int]] = []
    manifest = prepare(other, "d", shuffled, CONFIG, lambda done, total: calls.append((done, total)))
    assert manifest == prepared[1]
    assert contents(other) == contents(prepared[0])
    assert (calls[0], calls[-1]) == ((0, 8), (8, 8))


def test_the_store_holds_what_the_manifest_names_and_nothing_else(
    prepared: tuple[Store, Manifest],
) -> None:
    store, manifest = prepared
    named = [shard for split in manifest.shards.values() for shard in split]
    named_keys = {one.key for one in [*named, *manifest.held_out["val"], *manifest.held_out["test"]]}
    beside = {f"data/d/{file}" for file in ("manifest.json", "stamps.json", "card.json", "card.html")}
    kept = {f"scans/{path.name}" for path in Path(store.uri, "scans").iterdir()}
    assert {item.key for item in store.find()} == named_keys | beside | kept
    # Patches of all scans with their notes, and a note on each of four volumes.
    assert Counter(key.rpartition(".")[2] for key in kept) == {"json": 12, "arrow": 8}
    assert {split: len(ids) for split, ids in manifest.cases.items()} == {"train": 4, "val": 2, "test": 2}
    assert len(manifest.shards["train"]) >= 1
    assert "test" not in manifest.shards
    for split in ("val", "test"):
        assert tuple(entry.case_id for entry in manifest.held_out[split]) == manifest.cases[split]
        for entry in manifest.held_out[split]:
            stored = read_scan(store, entry)
            assert stored.volume.geometry.spacing_mm == (1.0, 1.0, 1.0)
            assert stored.mask.shape == stored.volume.volume_hu.shape == (28, 30, 36)
            assert stored.truth.geometry.shape_zyx == stored.truth.numbers.shape == (14, 30, 24)
            assert stored.truth.nodules == manifest.scans[entry.case_id].nodules
        assert len({entry.patient for entry in manifest.held_out[split]}) == 1  # both are of one patient


def test_every_patch_is_in_the_shards_once_with_its_case_and_its_count(
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase]
) -> None:
    store, manifest = prepared
    for split in ("train", "val"):
        found = all_patches(store, manifest, split)
        wanted = []
        for case in cases:
            if case.case_id in manifest.cases[split]:
                scan = case.load()
                wanted += cut_patches(case.case_id, scan, to_grid(scan, CONFIG.spacing_mm), CONFIG.patch)
        assert Counter(map(digest, found)) == Counter(map(digest, wanted))
        strata = Counter(patch.stratum for patch in wanted)
        counts = {"scans": len(manifest.cases[split]), "patches": len(found), **strata}
        counts["patients"] = len({c.patient_id for c in cases if c.case_id in manifest.cases[split]})
        assert manifest.counts[split] == counts | {"nodules": strata["nodule"] // 4}
        assert all((patch.mask == 1).any() for patch in found if patch.stratum == "nodule")


def digest(patch: shards.Patch) -> tuple[object, ...]:
    return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in vars(patch).values())


def test_names_of_files_and_patients_appear_in_no_key_and_no_object(
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase]
) -> None:
    ids = 0
    for key, data in contents(prepared[0]).items():
        for text in unpacked(key, data):
            assert b"MUSTER" not in text, key
            assert str(cases[0].image.parent).encode() not in text, key
            ids += cases[0].case_id.encode() in text
    assert ids  # this search finds what is there


def test_a_second_prepare_reuses_and_other_settings_or_splits_are_refused(
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase]
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
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase], tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    for key in ("work/x.json", "work/x.arrow", "shards/train-00077.arrow", "volumes/val/old.arrow"):
        store.put(f"data/d/{key}", b"stale")
    coarser = CONFIG.model_copy(update={"spacing_mm": (2.0, 1.0, 1.0)})
    scan = prepare_scan(store, "d", cases[0], "val", coarser)
    assert scan.held_out is not None
    assert store.exists(scan.held_out.key)
    prepare(store, "d", cases, CONFIG, quiet)
    assert of_data_sets(store) == of_data_sets(prepared[0])


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


def test_of_two_jobs_at_once_one_owns_the_name_and_its_data_set_is_whole(
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase], tmp_path: Path
) -> None:
    store = open_store(tmp_path)
    other = CONFIG.model_copy(update={"spacing_mm": (1.0, 1.0, 1.1)})

    def job(config: DataConfig) -> Manifest | DataError:
        try:
            return prepare(store, "d", cases, config, quiet)
        except DataError as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(job, (CONFIG, other, CONFIG)))
    lost = [one for one in results if isinstance(one, DataError)]
    assert [error.code for error in lost] == ["data-exists"] * len(lost)
    assert len(lost) in (1, 2)
    manifest = load_manifest(store, "d")
    assert all(one == manifest for one in results if not isinstance(one, DataError))
    for split in ("train", "val"):
        assert len(all_patches(store, manifest, split)) == manifest.counts[split]["patches"]
    for split in ("val", "test"):
        assert all(read_scan(store, entry) for entry in manifest.held_out[split])
    if len(lost) == 1:
        assert manifest == prepared[1]


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


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.05, 0.95), st.integers(0, 99))
@settings(deadline=None)
def test_a_plan_repeats_what_there_is_too_little_of_until_the_share_is_reached(
    positives, negatives, share, seed
):
    rows = [("c", row, row < positives) for row in range(positives + negatives)]
    placed = Counter(
        row for shard in plan_shards(rows, 2, 3, seed, share) for batch in shard for _, row in batch
    )
    assert set(placed) == set(range(positives + negatives))
    on_nodules = [placed[row] for row in range(positives)]
    others = [placed[row] for row in range(positives, positives + negatives)]
    assert abs(sum(on_nodules) - share * placed.total()) <= 1
    assert min(max(on_nodules), max(others)) == 1
    assert max(max(one) - min(one) for one in (on_nodules, others)) <= 1


def test_a_share_of_positives_holds_in_training_alone(
    prepared: tuple[Store, Manifest], cases: list[pairs.PairCase]
) -> None:
    store, natural = prepared
    shard = CONFIG.shard.model_copy(update={"positive_share": 0.9})
    found = prepare(store, "shared", cases, CONFIG.model_copy(update={"shard": shard}), quiet)
    assert found.counts == natural.counts
    assert (found.rows("val"), found.positives("val")) == (natural.rows("val"), natural.positives("val"))
    patches, on_nodules = sum(found.rows("train")), sum(found.positives("train"))
    assert sum(natural.positives("train")) < 0.85 * sum(natural.rows("train"))
    assert abs(on_nodules - 0.9 * patches) <= 1
    assert f"a pass over train gives {patches} patches, {on_nodules} of them on nodules" in describe(found)


@pytest.mark.parametrize("positive", [True, False])
def test_a_share_of_what_is_not_there_repeats_nothing(positive):
    rows = [("c", row, positive) for row in range(7)]
    assert plan_shards(rows, 2, 3, 0, 0.5) == plan_shards(rows, 2, 3, 0)


def test_a_plan_mixes_scans_and_differs_by_seed():
    rows = [(f"c{case}", row, row < 4) for case in range(20) for row in range(16)]
    batches = [batch for shard in plan_shards(rows, 4, 100, 0) for batch in shard]
    assert np.mean([len({case for case, _ in batch}) for batch in batches]) > 3.5
    assert plan_shards(rows, 4, 100, 1) != plan_shards(rows, 4, 100, 0)
