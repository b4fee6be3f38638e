"""Whole resampled scans in the store, for evaluation over full volumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa

from lungseg.dataset.case import IGNORE
from lungseg.errors import DataError
from lungseg.scan.volume import Geometry, Volume
from lungseg.storage import Store


@dataclass(frozen=True)
class StoredScanEntry:
    """Where a stored scan lies; its bytes must have this sha256."""

    case_id: str
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredScan:
    """A scan on the resampled grid; `numbers` int16 [z, y, x] as in `LabelledScan`."""

    volume: Volume
    numbers: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """uint8 [z, y, x]: 1 in any nodule, IGNORE where it is neither target nor background."""
        mask = (self.numbers > 0).view(np.uint8)
        mask[self.numbers < 0] = IGNORE
        return mask


def write_scan(store: Store, key: str, case_id: str, stored: StoredScan) -> StoredScanEntry:
    """One Arrow IPC file, zstd-compressed, with the geometry in the schema's metadata."""
    columns = [
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([array]))
        for array in (stored.volume.volume_hu, stored.numbers)
    ]
    geometry = json.dumps(asdict(stored.volume.geometry))
    batch = pa.record_batch(columns, ["image", "numbers"], metadata={"geometry": geometry})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
    with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    store.put(key, data)
    return StoredScanEntry(case_id, key, len(data), hashlib.sha256(data).hexdigest())


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
    data = store.get(entry.key)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        remedy = "restore the object from a copy, or prepare the data again under another name"
        raise DataError("scan-corrupt", key=entry.key, remedy=remedy)
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        batch = reader.get_batch(0)
        tree = json.loads(reader.schema.metadata[b"geometry"])
    tree["direction_lps"] = map(tuple, tree["direction_lps"])
    geometry = Geometry(**{name: tuple(value) for name, value in tree.items()})
    image, numbers = (batch.column(name).to_numpy_ndarray()[0] for name in ("image", "numbers"))
    return StoredScan(Volume(image, geometry), numbers)
