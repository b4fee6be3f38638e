"""Whole scans in the store, for evaluation: resampled, as the network sees them, and the truth on the scan's
own grid, on which scores are taken."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from lungseg.dataset.case import IGNORE, Nodule, Outlines, Truth
from lungseg.errors import DataError
from lungseg.scan.volume import Geometry, Volume, bounding_box
from lungseg.storage import Store

FORMAT = 2
"""Of a stored scan: 1 held no truth on the scan's own grid, and cannot be evaluated."""


@dataclass(frozen=True)
class StoredScanEntry:
    """Where a stored scan lies; its bytes must have this sha256. Of one patient are the scans of one
    `patient`, a mere number."""

    case_id: str
    key: str
    bytes: int
    sha256: str
    patient: int = 0
    format: int = 1


@dataclass(frozen=True)
class StoredScan:
    """A scan on the resampled grid, `numbers` int16 [z, y, x] as in `LabelledScan`, and the truth on the grid
    that the scan came with."""

    volume: Volume
    numbers: np.ndarray
    truth: Truth

    @property
    def mask(self) -> np.ndarray:
        """uint8 [z, y, x]: 1 in any nodule, IGNORE where it is neither target nor background."""
        mask = (self.numbers > 0).view(np.uint8)
        mask[self.numbers < 0] = IGNORE
        return mask


def write_scan(store: Store, key: str, case_id: str, stored: StoredScan) -> StoredScanEntry:
    """One Arrow IPC file of one row; geometry and truth are in the schema's metadata."""
    truth = stored.truth
    box = bounding_box(truth.numbers) or (slice(0, 1),) * 3
    packed = [np.packbits(one.masks).tobytes() for one in truth.outlines.values()]
    columns = {
        "image": tensor(stored.volume.volume_hu),
        "numbers": tensor(stored.numbers),
        "own_numbers": tensor(truth.numbers[box]),
        "outlines": pa.array([b"".join(packed)], pa.large_binary()),
    }
    data = pack_row(columns, {"geometry": asdict(stored.volume.geometry), "truth": _describe(truth, box)})
    store.put(key, data)
    return StoredScanEntry(case_id, key, len(data), hashlib.sha256(data).hexdigest(), format=FORMAT)


def tensor(array: np.ndarray) -> pa.Array:
    """A column of one row."""
    whole = np.ascontiguousarray(array)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(whole.reshape(1, *whole.shape))


def pack_row(columns: dict[str, pa.Array], metadata: dict[str, Any]) -> bytes:
    """An Arrow IPC file of one row, zstd-compressed, with JSON in the schema's metadata."""
    texts = {name: json.dumps(tree) for name, tree in metadata.items()}
    batch = pa.record_batch(list(columns.values()), list(columns), metadata=texts)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _describe(truth: Truth, box: tuple[slice, ...]) -> dict[str, Any]:
    """All but the voxels. Outlines are packed bits one after another, in the order of this list."""
    return {
        "geometry": asdict(truth.geometry),
        "first_zyx": [side.start for side in box],
        "nodules": [asdict(one) for one in truth.nodules],
        "regions": [asdict(one) for one in truth.regions],
        "outlines": [
            {"number": number, "first_zyx": one.first_zyx, "shape": one.masks.shape}
            for number, one in truth.outlines.items()
        ],
    }


def copy_scan(store: Store, entry: StoredScanEntry, key: str) -> StoredScanEntry | None:
    """The same scan under another key; None if its bytes are gone or damaged."""
    if not store.exists(entry.key):
        return None
    data = store.get(entry.key)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        return None
    store.put(key, data)
    return replace(entry, key=key)


def read_scan(store: Store, entry: StoredScanEntry) -> StoredScan:
    """Raises DataError("scan-corrupt") if the bytes are not those that were written."""
    row, metadata = _read(store, entry, None)
    image, numbers = (row.column(name).to_numpy_ndarray()[0] for name in ("image", "numbers"))
    volume = Volume(image, geometry_of(json.loads(metadata[b"geometry"])))
    return StoredScan(volume, numbers, _truth(row, metadata))


def read_truth(store: Store, entry: StoredScanEntry) -> Truth:
    """As `read_scan`, without unpacking the scan."""
    return _truth(*_read(store, entry, [2, 3]))


def _read(
    store: Store, entry: StoredScanEntry, columns: list[int] | None
) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
    data = store.get(entry.key)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        remedy = "restore the object from a copy, or prepare the data again under another name"
        raise DataError("scan-corrupt", key=entry.key, remedy=remedy)
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    with pa.ipc.open_file(pa.BufferReader(data), options=options) as reader:
        return reader.get_batch(0), reader.schema.metadata


def _truth(row: pa.RecordBatch, metadata: dict[bytes, bytes]) -> Truth:
    tree = json.loads(metadata[b"truth"])
    geometry = geometry_of(tree["geometry"])
    part = row.column("own_numbers").to_numpy_ndarray()[0]
    numbers = np.zeros(geometry.shape_zyx, np.int16)
    ends = zip(tree["first_zyx"], part.shape, strict=True)
    numbers[tuple(slice(first, first + length) for first, length in ends)] = part
    nodules, regions = (tuple(map(Nodule.from_json, tree[name])) for name in ("nodules", "regions"))
    outlines, packed, start = {}, row.column("outlines")[0].as_py(), 0
    for one in tree["outlines"]:
        count = math.prod(one["shape"])
        bits = np.frombuffer(packed, np.uint8, -(-count // 8), start)
        start += bits.size
        masks = np.unpackbits(bits, count=count).view(bool).reshape(one["shape"])
        outlines[one["number"]] = Outlines(tuple(one["first_zyx"]), masks)
    return Truth(geometry, numbers, nodules, regions, outlines)


def geometry_of(tree: dict[str, Any]) -> Geometry:
    tree["direction_lps"] = map(tuple, tree["direction_lps"])
    return Geometry(**{name: tuple(value) for name, value in tree.items()})
