"""The manifest: what a data set consists of. It is written last, and makes shards and scans a data set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lungseg.config import DataConfig
from lungseg.dataset.case import Exclusion, ScanFacts
from lungseg.dataset.shards import FORMAT, READABLE, Extent, Shard
from lungseg.dataset.stored_scans import FORMAT as SCAN_FORMAT
from lungseg.dataset.stored_scans import StoredScanEntry
from lungseg.errors import DataError
from lungseg.storage import Store, keys, to_json


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of; `patients_by` says how patients were told apart, `sha256` is that of the
    manifest's own bytes in the store."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    patch_shape_zyx: tuple[int, int, int]
    shards: dict[str, tuple[Shard, ...]]
    held_out: dict[str, tuple[StoredScanEntry, ...]]
    cases: dict[str, tuple[str, ...]]
    counts: dict[str, dict[str, int]]
    excluded: tuple[Exclusion, ...]
    batches_per_get: int = 1
    scans: dict[str, ScanFacts] = field(default_factory=dict)
    patients_by: str = ""
    sha256: str = ""

    def to_bytes(self) -> bytes:
        tree = asdict(self)
        del tree["sha256"]
        return to_json({"format": FORMAT, **tree})

    def extents(self, split: str) -> list[Extent]:
        """All record batches of a split in the order that `order` counts them in, by what one GET fetches."""
        return [
            Extent(shard, first, min(first + self.batches_per_get, len(shard.batches)))
            for shard in self.shards[split]
            for first in range(0, len(shard.batches), self.batches_per_get)
        ]

    def rows(self, split: str) -> list[int]:
        return [batch.rows for shard in self.shards[split] for batch in shard.batches]

    def positives(self, split: str) -> list[int]:
        return [batch.positives for shard in self.shards[split] for batch in shard.batches]

    def require_held_out(self, split: str) -> tuple[StoredScanEntry, ...]:
        """The whole scans of a split. Raises DataError("split-empty") where none are kept, and
        DataError("held-out-format") where they were kept by a version that scored on the resampled grid."""
        if not self.held_out.get(split):
            kept = ", ".join(name for name, found in self.held_out.items() if found) or "none"
            raise DataError("split-empty", data=self.name, split=split, remedy=f"splits with scans: {kept}")
        if any(entry.format != SCAN_FORMAT for entry in self.held_out[split]):
            message = "its held-out scans lack the truth on their own grid"
            remedy = "prepare the data again under another --data name, and name that to evaluate: --data NEW"
            raise DataError("held-out-format", data=self.name, message=message, remedy=remedy)
        return self.held_out[split]


def load_manifest(store: Store, name: str) -> Manifest:
    """Raises DataError("data-missing" or "manifest-format")."""
    key = keys.data_manifest(name)
    if not store.exists(key):
        done = [other for other in store.folders(keys.DATA) if store.exists(keys.data_manifest(other))]
        remedy = f"run `lungseg prepare`; finished data sets here: {', '.join(done) or 'none'}"
        raise DataError("data-missing", store=store.uri, data=name, remedy=remedy)
    tree = store.get_json(key)
    if not isinstance(tree, dict) or tree.pop("format", None) not in READABLE:
        raise DataError("manifest-format", key=key, remedy="prepare the data again with this version")
    tree["shards"] = {s: tuple(map(Shard.from_json, shards)) for s, shards in tree["shards"].items()}
    tree["held_out"] = {
        s: tuple(StoredScanEntry(**v) for v in found) for s, found in tree["held_out"].items()
    }
    tree["cases"] = {split: tuple(cases) for split, cases in tree["cases"].items()}
    tree["patch_shape_zyx"] = tuple(tree["patch_shape_zyx"])
    tree["excluded"] = tuple(Exclusion(**row) for row in tree["excluded"])
    tree["scans"] = {case: ScanFacts.from_json(facts) for case, facts in tree["scans"].items()}
    return Manifest(**tree, sha256=hashlib.sha256(store.get(key)).hexdigest())


def prepared_as(store: Store, name: str, sha256: str) -> DataConfig | None:
    """Settings of the data set whose manifest has this digest, in any format; None if it is gone."""
    key = keys.data_manifest(name)
    data = store.get(key) if store.exists(key) else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        return None
    return DataConfig.model_validate(json.loads(data)["config"])
