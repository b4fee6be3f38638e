"""Manifests: what makes shards a data set, told from others by the checksum of its bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from lungseg.config import DataConfig
from lungseg.dataset.case import Exclusion
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.shards import Extent, RecordBatch, Shard
from lungseg.dataset.stored_scans import FORMAT as SCAN_FORMAT
from lungseg.dataset.stored_scans import StoredScanEntry
from lungseg.errors import DataError
from lungseg.storage import open_store, to_json
from lungseg.storage.keys import data_manifest

SHAPE = (3, 4, 5)


def manifest(name: str = "d") -> Manifest:
    shards = [
        Shard(
            f"data/{name}/shards/{split}-{number:05d}.arrow",
            1000,
            "ab" * 32,
            "planes-lz4",
            tuple(
                RecordBatch(512 + 64 * batch, 64, rows, batch, 2**32 - 1)
                for batch, rows in enumerate((2, 2, 1))
            ),
        )
        for split, number in (("train", 0), ("train", 1), ("val", 0))
    ]
    return Manifest(
        name=name,
        fingerprint="cd" * 32,
        config=DataConfig().model_dump(mode="json"),
        patch_shape_zyx=SHAPE,
        shards={"train": tuple(shards[:2]), "val": (shards[2],)},
        held_out={"val": (StoredScanEntry("c", "data/d/volumes/val/c.arrow", 7, "ef" * 32),), "test": ()},
        cases={"train": ("a", "b"), "val": ("c",), "test": ()},
        counts={"train": {"scans": 2, "nodules": 3, "patches": 10, "nodule": 10}},
        excluded=(Exclusion("x", "slices-thick", "slices of 5 mm, thicker than 2.5 mm"),),
    )


def test_a_manifest_comes_back_equal_with_the_checksum_of_its_own_bytes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put(data_manifest("d"), manifest().to_bytes())
    read = load_manifest(store, "d")
    data = (tmp_path / "data/d/manifest.json").read_bytes()
    assert read == dataclasses.replace(manifest(), sha256=hashlib.sha256(data).hexdigest())
    assert read.to_bytes() == data


def test_held_out_scans_of_an_earlier_format_are_trained_beside_but_not_evaluated() -> None:
    """Its `held_out` is that of an earlier version, whose entries told no format."""
    with pytest.raises(DataError, match=r"held-out-format.*another --data name"):
        manifest().require_held_out("val")
    entry = StoredScanEntry("c", "data/d/volumes/val/c.arrow", 7, "ef" * 32, 1, SCAN_FORMAT)
    assert dataclasses.replace(manifest(), held_out={"val": (entry,)}).require_held_out("val") == (entry,)


def test_record_batches_are_counted_through_all_shards_of_a_split() -> None:
    first, second = manifest().shards["train"]
    assert manifest().extents("train") == [Extent(s, n, n + 1) for s in (first, second) for n in range(3)]
    paired = dataclasses.replace(manifest(), batches_per_get=2)  # none reaches from one shard into the next
    wanted = [Extent(s, *span) for s in (first, second) for span in ((0, 2), (2, 3))]
    assert paired.extents("train") == wanted
    assert manifest().rows("train") == [2, 2, 1, 2, 2, 1]
    assert manifest().positives("train") == [0, 1, 2, 0, 1, 2]


def test_a_missing_data_set_lists_the_finished_ones(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with pytest.raises(DataError, match="finished data sets here: none"):
        load_manifest(store, "d")
    for name in ("first", "second"):
        store.put(data_manifest(name), manifest(name).to_bytes())
    store.put("data/half-done/work/c.json", b"{}")
    with pytest.raises(DataError, match="data-missing") as caught:
        load_manifest(store, "d")
    assert caught.value.remedy.endswith("finished data sets here: first, second")


@pytest.mark.parametrize("tree", [{}, {"format": 0}, {"format": 1}, []])
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, tree: object) -> None:
    store = open_store(tmp_path)
    store.put(data_manifest("d"), to_json(tree))
    with pytest.raises(DataError, match="manifest-format"):
        load_manifest(store, "d")


def test_a_manifest_of_format_4_is_read_with_the_checksum_that_runs_on_it_remember(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    tree = json.loads(manifest().to_bytes())
    store.put(data_manifest("d"), to_json({**tree, "format": 4}))
    sha256 = hashlib.sha256(store.get(data_manifest("d"))).hexdigest()
    assert load_manifest(store, "d") == dataclasses.replace(manifest(), sha256=sha256)
