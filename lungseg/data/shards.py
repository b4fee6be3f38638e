"""Patches as Arrow IPC files in the store, and the manifest that makes them a data set.

A record batch of a few patches is the unit of I/O and of integrity: the manifest knows offset, bytes,
rows and crc32c of each, so a reader fetches it with one ranged GET and needs neither the file's footer
nor its neighbours. Arrow IPC itself does not notice a flipped bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from lungseg.config import Codec
from lungseg.data.volumes import VolumeEntry
from lungseg.errors import DataError
from lungseg.storage import Store, to_json
from lungseg.telemetry import CHECKSUM_FAILURES

FORMAT = 1
IGNORE = 255
"""Value of mask voxels that are neither target nor background."""


@dataclass(frozen=True)
class Patch:
    """One training example: `image_hu` int16 and `mask` uint8 (0, 1, IGNORE), both [z, y, x]."""

    image_hu: np.ndarray
    mask: np.ndarray
    case_id: str
    nodule_id: str
    stratum: str
    centre_lps_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class RecordBatch:
    """Where a record batch lies in its shard."""

    offset: int
    bytes: int
    rows: int
    crc32c: int


@dataclass(frozen=True)
class Shard:
    key: str
    bytes: int
    sha256: str
    batches: tuple[RecordBatch, ...]

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Shard:
        batches = tuple(RecordBatch(**batch) for batch in tree["batches"])
        return Shard(tree["key"], tree["bytes"], tree["sha256"], batches)


def schema(shape_zyx: Sequence[int]) -> pa.Schema:
    """Columns of a shard whose patches have `shape_zyx` voxels."""
    return pa.schema(
        {
            "image": pa.fixed_shape_tensor(pa.int16(), list(shape_zyx)),
            "mask": pa.fixed_shape_tensor(pa.uint8(), list(shape_zyx)),
            "case_id": pa.string(),
            "nodule_id": pa.string(),
            "stratum": pa.string(),
            "centre_lps_mm": pa.list_(pa.float64(), 3),
            "spacing_mm": pa.list_(pa.float64(), 3),
        }
    )


def encode(
    patches: Iterable[Sequence[Patch]], shape_zyx: Sequence[int], codec: Codec
) -> tuple[bytes, list[RecordBatch]]:
    """An Arrow IPC file with one record batch for each group of patches, and its list of RecordBatch."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=None if codec == "raw" else codec, use_threads=False)
    layout = schema(shape_zyx)
    spans = []
    # The writer puts magic (8 bytes) and schema before the first batch, when that is written.
    begin = 8 + layout.serialize().size
    with pa.ipc.new_file(sink, layout, options=options) as writer:
        for group in patches:
            writer.write_batch(_to_arrow(group, layout))
            spans.append((begin, sink.tell() - begin, len(group)))
            begin = sink.tell()
    data = sink.getvalue().to_pybytes()
    batches = [
        RecordBatch(begin, size, rows, google_crc32c.value(data[begin : begin + size]))
        for begin, size, rows in spans
    ]
    return data, batches


def write_shard(
    store: Store, key: str, patches: Iterable[Sequence[Patch]], shape_zyx: Sequence[int], codec: Codec
) -> Shard:
    """Encode and put; the same patches give the same bytes."""
    data, batches = encode(patches, shape_zyx, codec)
    store.put(key, data)
    return Shard(key, len(data), hashlib.sha256(data).hexdigest(), tuple(batches))


def read_record_batch(
    store: Store, shard: Shard, number: int, layout: pa.Schema, refetches: int = 3
) -> pa.RecordBatch:
    """Fetch, verify and decode record batch `number` of a shard.

    A wrong checksum is fetched again on a new connection, `refetches` times, then
    DataError("shard-corrupt") names shard and offset: wrong bytes never train a model.
    """
    place = shard.batches[number]
    for _ in range(refetches + 1):
        data = store.get(shard.key, place.offset, place.bytes)
        if google_crc32c.value(data) == place.crc32c:
            return pa.ipc.read_record_batch(pa.ipc.read_message(data), layout)
        CHECKSUM_FAILURES.inc()
        store.renew()
    raise DataError(
        "shard-corrupt",
        shard=shard.key,
        offset=place.offset,
        bytes=place.bytes,
        remedy="restore the object from a copy, or prepare the data again under another name",
    )


def tensors(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """A tensor column as one array [row, z, y, x], without a copy."""
    array: np.ndarray = batch.column(column).to_numpy_ndarray()
    return array


def patch_of(batch: pa.RecordBatch, row: int) -> Patch:
    """One row as a Patch."""
    fields = batch.slice(row, 1).drop_columns(["image", "mask"]).to_pylist()[0]
    for name in ("centre_lps_mm", "spacing_mm"):
        fields[name] = tuple(fields[name])
    return Patch(tensors(batch, "image")[row], tensors(batch, "mask")[row], **fields)


def _to_arrow(group: Sequence[Patch], layout: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in layout:
        if field.name in ("image", "mask"):
            name = "image_hu" if field.name == "image" else "mask"
            stacked = np.stack([getattr(patch, name) for patch in group])
            columns.append(pa.FixedShapeTensorArray.from_numpy_ndarray(stacked))
        else:
            columns.append(pa.array([getattr(patch, field.name) for patch in group], field.type))
    return pa.record_batch(columns, schema=layout)


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of; `sha256` is that of the manifest's own bytes in the store."""

    name: str
    fingerprint: str
    config: dict[str, Any]
    patch_shape_zyx: tuple[int, int, int]
    shards: dict[str, tuple[Shard, ...]]
    volumes: dict[str, tuple[VolumeEntry, ...]]
    cases: dict[str, tuple[str, ...]]
    counts: dict[str, dict[str, int]]
    excluded: tuple[dict[str, str], ...]
    sha256: str = ""

    def to_bytes(self) -> bytes:
        tree = asdict(self)
        del tree["sha256"]
        return to_json({"format": FORMAT, **tree})

    def record_batches(self, split: str) -> list[tuple[Shard, int]]:
        """(shard, number within it) of every record batch of a split, in the order `order` counts."""
        return [(shard, number) for shard in self.shards[split] for number in range(len(shard.batches))]

    def rows(self, split: str) -> list[int]:
        return [shard.batches[number].rows for shard, number in self.record_batches(split)]

    def held_out(self, split: str) -> tuple[VolumeEntry, ...]:
        """The whole scans of a split. Raises DataError("split-empty") where none are kept."""
        if not self.volumes.get(split):
            kept = ", ".join(name for name, found in self.volumes.items() if found) or "none"
            raise DataError("split-empty", data=self.name, split=split, remedy=f"splits with scans: {kept}")
        return self.volumes[split]


def manifest_key(name: str) -> str:
    return f"data/{name}/manifest.json"


def load_manifest(store: Store, name: str) -> Manifest:
    """Raises DataError("data-missing" or "manifest-format")."""
    key = manifest_key(name)
    if not store.exists(key):
        done = [other for other in store.folders("data/") if store.exists(manifest_key(other))]
        remedy = f"run `lungseg prepare`; finished data sets here: {', '.join(done) or 'none'}"
        raise DataError("data-missing", store=store.uri, data=name, remedy=remedy)
    tree = store.get_json(key)
    if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
        raise DataError("manifest-format", key=key, remedy="prepare the data again with this version")
    tree["shards"] = {s: tuple(map(Shard.from_json, shards)) for s, shards in tree["shards"].items()}
    tree["volumes"] = {s: tuple(VolumeEntry(**v) for v in found) for s, found in tree["volumes"].items()}
    tree["cases"] = {split: tuple(cases) for split, cases in tree["cases"].items()}
    tree["patch_shape_zyx"] = tuple(tree["patch_shape_zyx"])
    tree["excluded"] = tuple(tree["excluded"])
    return Manifest(**tree, sha256=hashlib.sha256(store.get(key)).hexdigest())
