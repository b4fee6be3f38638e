"""The distributed job that turns cases into shards, whole volumes and a manifest.

Two stages of Ray tasks. One task a scan resamples it, cuts its patches into a work file and commits that
by a small JSON beside it, so a killed job reads no scan twice. Then a pure plan mixes the patches of all
scans into shards, one task each. The manifest is written last. The result depends on the cases and the
settings alone, never on the number of workers or the order in which they finish.

The key of each object ends in a digest of what it is made of, so that jobs of other settings under the same
name write other objects: the first to write the manifest owns the name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lungseg.cluster import connect
from lungseg.config import DataConfig, PatchConfig
from lungseg.data import patches, shards
from lungseg.data.case import Case, LabelledScan
from lungseg.data.lungs import lung_mask
from lungseg.data.order import permutation
from lungseg.data.shards import FORMAT, IGNORE, POSITIVE, Extent, Manifest, Patch, Shard
from lungseg.data.splits import SPLITS, assign_splits, read_table
from lungseg.data.volume import AIR_HU, Volume, resample, resample_onto, vector
from lungseg.data.volumes import StoredVolume, VolumeEntry, write_volume
from lungseg.errors import DataError, LungsegError
from lungseg.storage import Store, to_json
from lungseg.telemetry import Progress


@dataclass(frozen=True)
class Prepared:
    """What one scan gave: its work file of patches (one a record batch) and its stored volume."""

    case_id: str
    strata: tuple[str, ...]
    work: Shard | None
    volume: VolumeEntry | None
    nodules: int


def prepare(
    store: Store,
    name: str,
    cases: Sequence[Case],
    config: DataConfig,
    progress: Progress,
    excluded: Sequence[dict[str, str]] = (),
) -> Manifest:
    """The data set `name`; one that is there already with the same cases and settings is reused.

    Raises DataError("cases-none"), DataError("data-exists") if it is there with others, as `read_table` and
    `assign_splits`, and whatever loading a scan raises.
    """
    if not cases:
        raise DataError("cases-none", data=name, remedy="give a folder with scans that are not all excluded")
    table = read_table(config.split.file) if config.split.file else None
    split_of = assign_splits([(case.case_id, case.patient_id) for case in cases], config.split, table)
    wanted = _fingerprint({"config": config.model_dump(mode="json"), "splits": split_of})
    key = shards.manifest_key(name)
    if not store.exists(key):
        try:
            built = _build(store, name, cases, split_of, config, progress, excluded, wanted)
            store.put_if_absent(key, built.to_bytes())
        except LungsegError:
            if not store.exists(key):  # else another job was first, and swept away what it does not name
                raise
    manifest = shards.load_manifest(store, name)
    if manifest.fingerprint != wanted:
        remedy = "choose another --data name, or delete the old data set"
        message = "made from other scans or settings"
        raise DataError("data-exists", data=name, store=store.uri, message=message, remedy=remedy)
    _sweep(store, manifest)
    return manifest


def _build(
    store: Store,
    name: str,
    cases: Sequence[Case],
    split_of: dict[str, str],
    config: DataConfig,
    progress: Progress,
    excluded: Sequence[dict[str, str]],
    fingerprint: str,
) -> Manifest:
    done = _scans(store, name, cases, split_of, config, progress)
    return Manifest(
        name=name,
        fingerprint=fingerprint,
        config=config.model_dump(mode="json"),
        patch_shape_zyx=config.patch.shape_zyx,
        shards={split: _shards(store, name, split, done, split_of, config) for split in SPLITS[:2]},
        volumes={
            split: tuple(d.volume for d in done if d.volume and split_of[d.case_id] == split)
            for split in SPLITS[1:]
        },
        cases={split: tuple(d.case_id for d in done if split_of[d.case_id] == split) for split in SPLITS},
        counts={split: _counts([d for d in done if split_of[d.case_id] == split]) for split in SPLITS},
        excluded=tuple(excluded),
        batches_per_get=config.shard.batches_per_get,
    )


def _sweep(store: Store, manifest: Manifest) -> None:
    """Delete the work files, and what jobs with other settings left behind."""
    named = {shard.key for split in manifest.shards.values() for shard in split}
    named |= {volume.key for split in manifest.volumes.values() for volume in split}
    for folder in ("work", "shards", "volumes"):
        found = store.find(f"data/{manifest.name}/{folder}/")
        store.delete([item.key for item in found if item.key not in named])


def plan_shards(
    rows: Sequence[tuple[str, int, bool]], rows_per_batch: int, batches_per_shard: int, seed: int
) -> list[list[list[tuple[str, int]]]]:
    """Shards of record batches of (case id, row), from all (case id, row, is positive).

    Both strata are shuffled over all scans and dealt out evenly, so that every run of n rows holds its
    share of positives to within one.
    """
    chosen: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    for case, row, positive in sorted(rows):
        chosen[positive].append((case, row))
    for positive, items in chosen.items():
        chosen[positive] = [items[i] for i in permutation(len(items), seed, int(positive))]
    total, positives = len(rows), len(chosen[True])
    mixed = []
    for k in range(total):
        # Bresenham's line: the running count of positives is floor(k * share) throughout.
        mixed.append(chosen[(k + 1) * positives // total > k * positives // total].pop())
    batches = [mixed[i : i + rows_per_batch] for i in range(0, total, rows_per_batch)]
    return [batches[i : i + batches_per_shard] for i in range(0, len(batches), batches_per_shard)]


def _scans(
    store: Store,
    name: str,
    cases: Sequence[Case],
    split_of: dict[str, str],
    config: DataConfig,
    progress: Progress,
) -> list[Prepared]:
    tasks = [(store, name, case, split_of[case.case_id], config) for case in cases]
    done: list[Prepared] = _parallel(_scan_task, tasks, progress)
    return sorted(done, key=lambda d: d.case_id)


def _parallel(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], progress: Progress
) -> list[Any]:
    """The results of Ray tasks in the order of `tasks`; a task whose worker dies is done again.

    What a task raises is raised as it is; those that wait are then given up.
    """
    ray = connect()
    remote = ray.remote(num_cpus=1, max_retries=3)(function)
    all_of_them = pending = [remote.remote(*arguments) for arguments in tasks]
    progress(0, len(tasks))
    try:
        while pending:
            ready, pending = ray.wait(pending)
            ray.get(ready)
            progress(len(tasks) - len(pending), len(tasks))
        results: list[Any] = ray.get(all_of_them)
    except Exception as error:
        raise LungsegError.find_in(error) or error from None
    finally:
        for reference in pending:
            ray.cancel(reference)
    return results


def _scan_task(store: Store, name: str, case: Case, split: str, config: DataConfig) -> Prepared:
    """Work of one scan, or what an earlier, killed job committed of it."""
    settings = config.model_dump(mode="json", exclude={"shard", "split"})
    stem = f"{case.case_id}-{_digest({'settings': settings, 'case': case.case_id, 'split': split})}"
    key = f"data/{name}/work/{stem}.json"
    if store.exists(key):
        return _prepared_from_json(store.get_json(key))
    scan = case.load()
    stored, ignore = to_grid(scan, config.spacing_mm)
    cut = [] if split == "test" else cut_patches(case.case_id, scan, stored, ignore, config.patch)
    work = None
    if cut:
        work_key = f"data/{name}/work/{stem}.arrow"
        work = shards.write_shard(store, work_key, ([p] for p in cut), config.patch.shape_zyx, "planes-lz4")
    volume = None
    if split != "train":
        volume_key = f"data/{name}/volumes/{split}/{stem}.arrow"
        volume = write_volume(store, volume_key, case.case_id, stored)
    prepared = Prepared(case.case_id, tuple(p.stratum for p in cut), work, volume, len(scan.nodules))
    store.put_json(key, asdict(prepared))
    return prepared


def to_grid(scan: LabelledScan, spacing_mm: tuple[float, float, float]) -> tuple[StoredVolume, np.ndarray]:
    """The scan on LPS axes at `spacing_mm` with its mask (IGNORE where the ignore regions are), and those
    regions alone. Masks go through linear interpolation and 0.5, which keeps a nodule's volume."""
    volume = resample(scan.volume, spacing_mm)

    def onto(mask: np.ndarray) -> np.ndarray:
        if not mask.any():
            return np.zeros(volume.geometry.shape_zyx, bool)
        soft = resample_onto(mask.astype(np.float32), scan.volume.geometry, volume.geometry, nearest=False)
        return soft >= 0.5

    target, ignore = onto(scan.mask), onto(scan.ignore)
    mask = np.where(target, np.uint8(1), np.where(ignore, np.uint8(IGNORE), np.uint8(0)))
    return StoredVolume(volume, mask), ignore & ~target


def cut_patches(
    case_id: str, scan: LabelledScan, stored: StoredVolume, ignore: np.ndarray, config: PatchConfig
) -> list[Patch]:
    """The training patches of one scan; deterministic in the case id and the settings."""
    volume: Volume = stored.volume
    centres = [(n.nodule_id, vector(volume.geometry.to_index_zyx(n.centre_lps_mm))) for n in scan.nodules]
    seed = int(_fingerprint([config.seed, case_id])[:15], 16)
    target = (stored.mask == 1).astype(np.uint8)
    lungs = lung_mask(volume)
    sites = patches.select_sites(
        target, ignore.astype(np.uint8), lungs, volume.volume_hu, centres, config, seed
    )
    return [
        Patch(
            image_hu=patches.cut(volume.volume_hu, site.centre_zyx, config.shape_zyx, AIR_HU),
            mask=patches.cut(stored.mask, site.centre_zyx, config.shape_zyx, 0),
            case_id=case_id,
            nodule_id=site.nodule_id,
            stratum=site.stratum,
            centre_lps_mm=tuple(volume.geometry.to_lps_mm(site.centre_zyx).tolist()),
            spacing_mm=volume.geometry.spacing_mm,
        )
        for site in sites
    ]


def _shards(
    store: Store,
    name: str,
    split: str,
    done: Sequence[Prepared],
    split_of: dict[str, str],
    config: DataConfig,
) -> tuple[Shard, ...]:
    mine = {d.case_id: d for d in done if split_of[d.case_id] == split and d.work}
    rows = [(c, row, s == POSITIVE) for c, d in mine.items() for row, s in enumerate(d.strata)]
    patch_bytes = 3 * int(np.prod(config.patch.shape_zyx))
    per_extent = config.shard.batches_per_get
    per_shard = (config.shard.target_mib << 20) // (patch_bytes * config.shard.rows_per_batch)
    per_shard = max(1, per_shard // per_extent) * per_extent
    plan = plan_shards(rows, config.shard.rows_per_batch, per_shard, config.shard.seed)
    work = {case: d.work for case, d in mine.items()}
    tasks = [
        (
            store,
            f"data/{name}",
            f"{split}-{number:05d}",
            batches,
            {case: work[case] for batch in batches for case, _ in batch},
            config,
        )
        for number, batches in enumerate(plan)
    ]
    return tuple(_parallel(_shard_task, tasks, lambda done, total: None))


def _shard_task(
    store: Store,
    root: str,
    title: str,
    batches: list[list[tuple[str, int]]],
    work: dict[str, Shard],
    config: DataConfig,
) -> Shard:
    """One shard, or what an earlier, killed job committed of it."""
    shape, codec = config.patch.shape_zyx, config.shard.codec
    digest = _digest([codec, shape, batches, {case: shard.sha256 for case, shard in work.items()}])
    key, committed = (f"{root}/shards/{title}-{digest}.arrow", f"{root}/work/shards/{title}-{digest}.json")
    if store.exists(committed) and store.exists(key):
        return Shard.from_json(store.get_json(committed))

    def load(case: str, row: int) -> Patch:
        source = work[case]
        data = shards.fetch(store, Extent(source, row, row + 1))
        return shards.patches_of(data, shape, source.codec)[0]

    groups = ([load(case, row) for case, row in batch] for batch in batches)
    shard = shards.write_shard(store, key, groups, shape, codec)
    store.put_json(committed, asdict(shard))
    return shard


def _counts(done: Sequence[Prepared]) -> dict[str, int]:
    strata = Counter(stratum for d in done for stratum in d.strata)
    return {"scans": len(done), "nodules": sum(d.nodules for d in done), "patches": strata.total(), **strata}


def _prepared_from_json(tree: dict[str, Any]) -> Prepared:
    work, volume = tree.pop("work"), tree.pop("volume")
    return Prepared(
        **{**tree, "strata": tuple(tree["strata"])},
        work=Shard.from_json(work) if work else None,
        volume=VolumeEntry(**volume) if volume else None,
    )


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(to_json([FORMAT, value])).hexdigest()


def _digest(value: Any) -> str:
    """Short enough for a key, and long enough that no two things of one name share it."""
    return _fingerprint(value)[:16]
