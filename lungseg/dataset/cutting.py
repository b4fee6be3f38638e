"""One scan of a data set: read, resampled, its patches cut.

What a scan gives is committed by a small JSON that is written last. Patches lie in `scans/` of the store,
under a key that tells settings and files apart, and stay there: a killed job goes on, and a data set with
other splits, other shards or more scans cuts none of them again. Whole volumes belong to their data set, from
which another copies them. Deleting `scans/` costs time, nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from scipy.spatial import cKDTree

from lungseg.config import DataConfig, PatchConfig
from lungseg.dataset import patches, shards
from lungseg.dataset.case import Case, LabelledScan, ScanFacts
from lungseg.dataset.shards import FORMAT, Patch, Shard
from lungseg.dataset.stored_scans import FORMAT as SCAN_FORMAT
from lungseg.dataset.stored_scans import StoredScan, StoredScanEntry, copy_scan, write_scan
from lungseg.errors import DataError
from lungseg.scan.lungs import lung_mask
from lungseg.scan.resample import resample, resample_mask
from lungseg.scan.volume import AIR_HU, Geometry, Volume, vector
from lungseg.storage import Store, keys, to_json

WORK_FORMAT = 6
"""Of what is kept of a scan: that of another version is not read."""
DRAW = 3
"""Of the choice of patches: another number draws all of them anew, as a new format alone must not."""
T = TypeVar("T", "Cut", StoredScanEntry)


@dataclass(frozen=True)
class Cut:
    """The patches of one scan, one a record batch; `shard` is None where there are none."""

    strata: tuple[str, ...]
    shard: Shard | None
    facts: ScanFacts

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Cut:
        shard = Shard.from_json(tree["shard"]) if tree["shard"] else None
        return Cut(tuple(tree["strata"]), shard, ScanFacts.from_json(tree["facts"]))


@dataclass(frozen=True)
class Prepared:
    """What one scan gave a data set; `held_out` is the whole scan, None in training."""

    case_id: str
    cut: Cut
    held_out: StoredScanEntry | None = None


def prepare_scan(store: Store, name: str, case: Case, split: str, config: DataConfig) -> Prepared:
    """What one scan gives the data set `name`, or what was committed of it.

    Raises what loading it raises, and DataError("not-hu").
    """
    settings = config.model_dump(mode="json", exclude={"shard", "split"})
    stem = f"{case.case_id}-{digest([WORK_FORMAT, settings, case.stamp()])}"

    @cache
    def read() -> tuple[LabelledScan, StoredScan]:
        scan = case.load()
        if scan.volume.not_hu and not config.allow_not_hu:
            remedy = "give the scan in HU, or take such scans by data.allow_not_hu=true"
            raise DataError("not-hu", scan=case.case_id, message=scan.volume.not_hu, remedy=remedy)
        return scan, to_grid(scan, config.spacing_mm)

    def make_cut() -> Cut:
        scan, stored = read()
        found = cut_patches(case.case_id, scan, stored, config.patch)
        shard = None
        if found:
            key, shape = keys.kept_patches(stem), config.patch.shape_zyx
            shard = shards.write_shard(store, key, ([patch] for patch in found), shape, "planes-lz4")
        return Cut(tuple(patch.stratum for patch in found), shard, ScanFacts.of(scan))

    def hold_out() -> StoredScanEntry:
        made_of = digest([SCAN_FORMAT, settings, split, cut.facts.sha256])
        key = keys.held_out(name, split, f"{case.case_id}-{made_of}")
        note = keys.kept_held_out(stem)
        earlier = StoredScanEntry(**store.get_json(note)) if store.exists(note) else None
        copied = copy_scan(store, earlier, key) if earlier else None
        if copied:
            return copied
        written = write_scan(store, key, case.case_id, read()[1])
        store.put_json(note, asdict(written))
        return written

    cut = _once(store, keys.kept(stem), Cut.from_json, make_cut)
    if split == "train":
        return Prepared(case.case_id, cut)
    committed = keys.data_work(name, f"{split}-{stem}")
    return Prepared(
        case.case_id, cut, _once(store, committed, lambda tree: StoredScanEntry(**tree), hold_out)
    )


def _once(store: Store, key: str, from_json: Callable[[dict[str, Any]], T], make: Callable[[], T]) -> T:
    """What is committed under `key`, or is made and committed now."""
    if store.exists(key):
        return from_json(store.get_json(key))
    made = make()
    store.put_json(key, asdict(made))
    return made


def to_grid(scan: LabelledScan, spacing_mm: tuple[float, float, float]) -> StoredScan:
    """The scan on LPS axes at `spacing_mm` with its numbers, and the truth on its own grid."""
    volume = resample(scan.volume, spacing_mm)
    return StoredScan(volume, _numbers_on(volume.geometry, scan), scan.truth)


def _numbers_on(target: Geometry, scan: LabelledScan) -> np.ndarray:
    """int16 [z, y, x] on `target`. All nodules together, and all regions to ignore, go through linear
    interpolation and 0.5, which keeps their volume; whose a voxel is, its nearest numbered voxel says."""
    source = scan.volume.geometry
    nodules, ignored = (resample_mask(mask, source, target) for mask in (scan.mask, scan.ignore))
    numbers = np.zeros(target.shape_zyx, np.int16)
    for inside, own in ((nodules, scan.numbers > 0), (ignored & ~nodules, scan.numbers < 0)):
        if inside.any():
            near = cKDTree(source.to_lps_mm(np.argwhere(own)))
            _, nearest = near.query(target.to_lps_mm(np.argwhere(inside)))
            numbers[inside] = scan.numbers[own][nearest]
    return numbers


def cut_patches(case_id: str, scan: LabelledScan, stored: StoredScan, config: PatchConfig) -> list[Patch]:
    """The training patches of one scan; deterministic in the case id and the settings."""
    volume: Volume = stored.volume
    centres = [(n.nodule_id, vector(volume.geometry.to_index_zyx(n.centre_lps_mm))) for n in scan.nodules]
    seed = int(hashlib.sha256(to_json([DRAW, [config.seed, case_id]])).hexdigest()[:15], 16)
    mask = stored.mask
    sites = patches.select_sites(mask, lung_mask(volume), volume.volume_hu, centres, config, seed)
    return [
        Patch(
            image_hu=patches.cut(volume.volume_hu, site.centre_zyx, config.shape_zyx, AIR_HU),
            mask=patches.cut(mask, site.centre_zyx, config.shape_zyx, 0),
            case_id=case_id,
            nodule_id=site.nodule_id,
            stratum=site.stratum,
            centre_lps_mm=tuple(volume.geometry.to_lps_mm(site.centre_zyx).tolist()),
            spacing_mm=volume.geometry.spacing_mm,
        )
        for site in sites
    ]


def fingerprint(value: Any) -> str:
    return hashlib.sha256(to_json([FORMAT, value])).hexdigest()


def digest(value: Any) -> str:
    """Short enough for a key, and long enough that no two things of one name share it."""
    return fingerprint(value)[:16]
