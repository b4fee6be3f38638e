"""The distributed job that turns cases into shards, whole volumes and a manifest.

Two stages of Ray tasks. One task a scan (`scans.py`) reads it and commits its patches, so that a killed job
reads no scan twice. Then a pure plan mixes the patches of all scans into shards, one task each. The manifest
is written last, then the data card. The result depends on the cases and the settings alone, never on the
number of workers or the order in which they finish.

The key of each object ends in a digest of what it is made of, so that jobs of other settings under the same
name write other objects: the first to write the manifest owns the name.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from lungseg.cluster import run_tasks
from lungseg.config import DataConfig
from lungseg.dataset import shards
from lungseg.dataset.card import write_card
from lungseg.dataset.case import Case, Exclusion
from lungseg.dataset.cutting import Prepared, digest, fingerprint, prepare_scan
from lungseg.dataset.manifest import Manifest, load_manifest
from lungseg.dataset.plan import plan_shards
from lungseg.dataset.same import (
    keep_stamps,
    kept_stamps,
    require_same_scans,
    require_same_settings,
    stamps_now,
)
from lungseg.dataset.shards import POSITIVE, Extent, Patch, Shard
from lungseg.dataset.splits import SPLITS, assign_splits, describe_split, read_table
from lungseg.errors import DataError, GeometryError, LungsegError
from lungseg.storage import Store, keys
from lungseg.telemetry import Progress, log

SCAN_BYTES = 1536 << 20
"""Memory that Ray keeps free for the task of a scan, so that no node runs more of them than it can hold."""
SHARD_BYTES = 1024 << 20


def prepare(
    store: Store,
    name: str,
    cases: Sequence[Case],
    config: DataConfig,
    progress: Progress,
    excluded: Sequence[Exclusion] = (),
    skip_broken: bool = False,
) -> Manifest:
    """The data set `name`; one that is there already, of the same scans and settings, is reused.

    All scans are tried, and each that cannot be used is logged. With `skip_broken` the manifest lists them
    under `excluded`, else nothing is made: what the only one raised is raised, or DataError("scans-broken").
    Raises DataError("cases-none"); DataError("data-exists") if it is there with others, or if a scan or a
    mask has changed since; as `read_table` and `assign_splits`.
    """
    if not cases:
        raise DataError("cases-none", data=name, remedy="give a folder with scans that are not all excluded")
    table = read_table(config.split.file) if config.split.file else None
    people = [(case.case_id, case.patient_id) for case in cases]
    split_of = assign_splits(people, config.split, table)
    log("data").info(describe_split(people, split_of, cases[0].patients_by))
    wanted = fingerprint({"config": config.model_dump(mode="json"), "splits": split_of})
    stamps = stamps_now(cases)
    if not store.exists(keys.data_manifest(name)):
        _make(store, name, cases, split_of, config, progress, excluded, skip_broken, wanted, stamps)
    manifest = load_manifest(store, name)
    require_same_settings(manifest, wanted, store)
    if not stamps or kept_stamps(store, manifest) != stamps:
        # Only the digests are wanted, and nothing may be written beside what is there: as of training scans.
        done, _ = _scans(store, name, cases, dict.fromkeys(split_of, "train"), config, progress)
        require_same_scans(manifest, {one.case_id: one.cut.facts.sha256 for one in done}, store)
        keep_stamps(store, name, manifest.sha256, stamps)
    broken_then = sum(one.broken for one in manifest.excluded)
    if broken_then and not skip_broken:
        remedy = "allow it with --skip-broken, or prepare the mended scans under another --data name"
        message = f"{broken_then} broken scans were left out of this data set"
        raise DataError("scans-broken", data=name, message=message, remedy=remedy)
    _sweep(store, manifest)
    write_card(store, manifest)
    return manifest


def _make(
    store: Store,
    name: str,
    cases: Sequence[Case],
    split_of: dict[str, str],
    config: DataConfig,
    progress: Progress,
    excluded: Sequence[Exclusion],
    skip_broken: bool,
    wanted: str,
    stamps: str,
) -> None:
    """Make the data set, unless another job is first."""
    key = keys.data_manifest(name)
    try:
        done, broken = _scans(store, name, cases, split_of, config, progress)
        if broken and not (skip_broken and done):
            raise _refused(broken, len(cases))
        left_out = [*excluded, *(_exclusion(case_id, error) for case_id, error in broken.items())]
        manifest = _build(store, name, cases, done, split_of, config, left_out, wanted).to_bytes()
    except LungsegError:
        if store.exists(key):  # another job was first, and swept away what it does not name
            return
        raise
    if store.put_if_absent(key, manifest):
        keep_stamps(store, name, hashlib.sha256(manifest).hexdigest(), stamps)


def _build(
    store: Store,
    name: str,
    cases: Sequence[Case],
    done: Sequence[Prepared],
    split_of: dict[str, str],
    config: DataConfig,
    excluded: Sequence[Exclusion],
    wanted: str,
) -> Manifest:
    patient_of = {case.case_id: case.patient_id for case in cases}
    patients = dict.fromkeys(patient_of[one.case_id] for one in done)
    numbers = {patient: number for number, patient in enumerate(patients, 1)}
    return Manifest(
        name=name,
        fingerprint=wanted,
        config=config.model_dump(mode="json"),
        patch_shape_zyx=config.patch.shape_zyx,
        shards={split: _shards(store, name, split, done, split_of, config) for split in SPLITS[:2]},
        held_out={
            split: tuple(
                replace(one.held_out, patient=numbers[patient_of[one.case_id]])
                for one in done
                if one.held_out and split_of[one.case_id] == split
            )
            for split in SPLITS[1:]
        },
        cases={split: tuple(d.case_id for d in done if split_of[d.case_id] == split) for split in SPLITS},
        counts={
            split: _counts(split, [d for d in done if split_of[d.case_id] == split], patient_of)
            for split in SPLITS
        },
        excluded=tuple(excluded),
        batches_per_get=config.shard.batches_of_get(_patch_bytes(config)),
        scans={d.case_id: d.cut.facts for d in done},
        patients_by=cases[0].patients_by,
    )


def _refused(broken: dict[str, LungsegError], scans: int) -> LungsegError:
    if len(broken) == 1:
        return next(iter(broken.values()))
    codes = Counter(error.code for error in broken.values())
    message = ", ".join(f"{count} {code}" for code, count in codes.most_common())
    remedy = "mend the scans that are listed above, or leave them out with --skip-broken"
    return DataError("scans-broken", scans=f"{len(broken)} of {scans}", message=message, remedy=remedy)


def _exclusion(case_id: str, error: LungsegError) -> Exclusion:
    """The error's text stays out of the manifest: it names files, which may be named after patients."""
    return Exclusion(case_id, error.code, "could not be used, and was left out on demand", broken=True)


def _sweep(store: Store, manifest: Manifest) -> None:
    """Delete the work files, and what jobs with other settings left behind."""
    named = {shard.key for split in manifest.shards.values() for shard in split}
    named |= {scan.key for split in manifest.held_out.values() for scan in split}
    for prefix in keys.data_swept(manifest.name):
        store.delete([item.key for item in store.find(prefix) if item.key not in named])


def _scans(
    store: Store,
    name: str,
    cases: Sequence[Case],
    split_of: dict[str, str],
    config: DataConfig,
    progress: Progress,
) -> tuple[list[Prepared], dict[str, LungsegError]]:
    """What the scans gave, by case id, and what is wrong with those that are broken."""
    tasks = [(store, name, case, split_of[case.case_id], config) for case in cases]

    def show(result: Prepared | tuple[str, LungsegError]) -> None:
        if isinstance(result, tuple):
            log("data").warning("scan %s is broken: %s", *result)

    found = run_tasks(_scan_task, tasks, SCAN_BYTES, progress, show)
    done = [one for one in found if isinstance(one, Prepared)]
    broken: dict[str, LungsegError] = dict(one for one in found if isinstance(one, tuple))
    return sorted(done, key=lambda d: d.case_id), dict(sorted(broken.items()))


def _scan_task(
    store: Store, name: str, case: Case, split: str, config: DataConfig
) -> Prepared | tuple[str, LungsegError]:
    """What the scan gives, or its id and what is wrong with it: returned, so that the others go on."""
    try:
        return prepare_scan(store, name, case, split, config)
    except (DataError, GeometryError) as error:
        return case.case_id, error


def _shards(
    store: Store,
    name: str,
    split: str,
    done: Sequence[Prepared],
    split_of: dict[str, str],
    config: DataConfig,
) -> tuple[Shard, ...]:
    mine = {d.case_id: d.cut for d in done if split_of[d.case_id] == split and d.cut.shard}
    rows = [(c, row, s == POSITIVE) for c, cut in mine.items() for row, s in enumerate(cut.strata)]
    patch_bytes = _patch_bytes(config)
    per_extent = config.shard.batches_of_get(patch_bytes)
    per_shard = (config.shard.target_mib << 20) // (patch_bytes * config.shard.rows_per_batch)
    per_shard = max(1, per_shard // per_extent) * per_extent
    share = config.shard.positive_share if split == "train" else None
    plan = plan_shards(rows, config.shard.rows_per_batch, per_shard, config.shard.seed, share)
    work = {case: cut.shard for case, cut in mine.items()}
    tasks = [
        (
            store,
            name,
            f"{split}-{number:05d}",
            batches,
            {case: work[case] for batch in batches for case, _ in batch},
            config,
        )
        for number, batches in enumerate(plan)
    ]
    return tuple(run_tasks(_shard_task, tasks, SHARD_BYTES))


def _patch_bytes(config: DataConfig) -> int:
    """Decoded: int16 HU and a uint8 mask."""
    return 3 * math.prod(config.patch.shape_zyx)


def _shard_task(
    store: Store,
    name: str,
    title: str,
    batches: list[list[tuple[str, int]]],
    work: dict[str, Shard],
    config: DataConfig,
) -> Shard:
    """One shard, or what an earlier, killed job committed of it."""
    shape, codec = config.patch.shape_zyx, config.shard.codec
    stem = f"{title}-{digest([codec, shape, batches, {case: shard.sha256 for case, shard in work.items()}])}"
    key, committed = keys.shard(name, stem), keys.data_shard_work(name, stem)
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


def _counts(split: str, done: Sequence[Prepared], patient_of: dict[str, str]) -> dict[str, int]:
    strata = Counter(stratum for d in done for stratum in d.cut.strata if split != "test")
    nodules = sum(len(d.cut.facts.nodules) for d in done)
    patients = len({patient_of[d.case_id] for d in done})
    return {"scans": len(done), "patients": patients, "nodules": nodules, "patches": strata.total(), **strata}
