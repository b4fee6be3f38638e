"""Patches as Arrow IPC files in the store, and the manifest that makes them a data set.

A record batch of a few patches is the unit of integrity: the manifest knows offset, bytes, rows and crc32c
of each, so a reader needs neither the file's footer nor other record batches. Arrow IPC itself does not
notice a flipped bit. An extent, a few adjacent record batches, is the unit of I/O: one ranged GET.

A shard's codec says how its voxels lie in it. "lz4" and "zstd" are Arrow's own compression. The noise of CT
sits in the low bytes of its int16, so LZ4 alone finds nothing in it; the "planes-" codecs compress planes of
one significance each, of which the higher ones nearly vanish: bits for LZ4, bytes for Zstandard. "raw" leaves
images as they are. Where Arrow does not compress them, voxels are binary columns of a Blosc frame a patch,
which comes apart in pieces that fit into a core's cache, straight into the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import blosc
import crc32c
import numpy as np
import pyarrow as pa

from lungseg.config import Codec
from lungseg.dataset.patches import STRATA
from lungseg.errors import DataError
from lungseg.storage import Store
from lungseg.telemetry import CHECKSUM_FAILURES

FORMAT = 5
READABLE = (4, FORMAT)
POSITIVE = STRATA[0]

# By codec what Blosc compresses images with, and how hard: beyond these levels LZ4 knows no more, and
# Zstandard takes far longer for little.
_IMAGES = {"planes-lz4": ("lz4", blosc.BITSHUFFLE, 9), "planes-zstd": ("zstd", blosc.SHUFFLE, 3)}
_MASKS = ("lz4", blosc.NOSHUFFLE, 9)
blosc.set_blocksize(1 << 16)  # with blocks of a whole patch each decoding thread kept some 20 MiB
blosc.set_nthreads(1)  # patches are decoded beside each other, and a fork would not take its threads along
blosc.set_releasegil(True)
_FORMAT_4 = {b"\x04\x22\x4d\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd"}  # by what its frames begin with

Buffer = bytes | memoryview


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
    """Where a record batch lies in its shard; of its rows so many are patches of nodules."""

    offset: int
    bytes: int
    rows: int
    positives: int
    crc32c: int


@dataclass(frozen=True)
class Shard:
    key: str
    bytes: int
    sha256: str
    codec: Codec
    batches: tuple[RecordBatch, ...]

    @staticmethod
    def from_json(tree: dict[str, Any]) -> Shard:
        return Shard(**{**tree, "batches": tuple(RecordBatch(**batch) for batch in tree["batches"])})


@lru_cache(maxsize=64)
def schema(shape_zyx: tuple[int, ...], codec: Codec) -> pa.Schema:
    """Columns of a shard whose patches have `shape_zyx` voxels."""
    image, mask = pa.fixed_shape_tensor(pa.int16(), shape_zyx), pa.fixed_shape_tensor(pa.uint8(), shape_zyx)
    return pa.schema(
        {
            "image": pa.binary() if codec.startswith("planes") else image,
            "mask": mask if codec in ("lz4", "zstd") else pa.binary(),
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
    compression = codec if codec in ("lz4", "zstd") else None
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
    layout = schema(tuple(shape_zyx), codec)
    spans = []
    # The writer puts magic (8 bytes) and schema before the first batch, when that is written.
    begin = 8 + layout.serialize().size
    with pa.ipc.new_file(sink, layout, options=options) as writer:
        for group in patches:
            writer.write_batch(_to_arrow(group, layout, codec))
            positives = sum(patch.stratum == POSITIVE for patch in group)
            spans.append((begin, sink.tell() - begin, len(group), positives))
            begin = sink.tell()
    data = sink.getvalue().to_pybytes()
    batches = [
        RecordBatch(begin, size, rows, positives, crc32c.crc32c(data[begin : begin + size]))
        for begin, size, rows, positives in spans
    ]
    return data, batches


def write_shard(
    store: Store, key: str, patches: Iterable[Sequence[Patch]], shape_zyx: Sequence[int], codec: Codec
) -> Shard:
    """Encode and put; the same patches give the same bytes."""
    data, batches = encode(patches, shape_zyx, codec)
    store.put(key, data)
    return Shard(key, len(data), hashlib.sha256(data).hexdigest(), codec, tuple(batches))


@dataclass(frozen=True)
class Extent:
    """Record batches [first, stop) of a shard, which lie side by side."""

    shard: Shard
    first: int
    stop: int

    @property
    def batches(self) -> tuple[RecordBatch, ...]:
        return self.shard.batches[self.first : self.stop]

    @property
    def offset(self) -> int:
        return self.batches[0].offset

    @property
    def length(self) -> int:
        """Bytes."""
        return self.batches[-1].offset + self.batches[-1].bytes - self.offset

    def part(self, data: Buffer, batch: RecordBatch) -> memoryview:
        """The bytes of one of the record batches among those of all."""
        begin = batch.offset - self.offset
        return memoryview(data)[begin : begin + batch.bytes]

    def damage(self, data: Buffer) -> RecordBatch | None:
        """The first record batch whose bytes are not those that were written."""
        if len(memoryview(data)) != self.length:
            return self.batches[0]
        wrong = (b for b in self.batches if crc32c.crc32c(self.part(data, b), gil_release_mode=1) != b.crc32c)
        return next(wrong, None)


def fetch(
    store: Store, extent: Extent, refetches: int = 3, get: Callable[[str, int, int], Buffer] | None = None
) -> Buffer:
    """The verified bytes of an extent, by `get` or the store's own.

    A wrong checksum is fetched again on a new connection, `refetches` times, then
    DataError("shard-corrupt") names shard and offset: wrong bytes never train a model.
    """
    for _ in range(refetches + 1):
        data = (get or store.get)(extent.shard.key, extent.offset, extent.length)
        damaged = extent.damage(data)
        if damaged is None:
            return data
        CHECKSUM_FAILURES.inc()
        store.renew()
    assert damaged is not None
    raise DataError(
        "shard-corrupt",
        shard=extent.shard.key,
        offset=damaged.offset,
        bytes=damaged.bytes,
        remedy="restore the object from a copy, or prepare the data again under another name",
    )


def decode(data: Buffer, shape_zyx: Sequence[int], codec: Codec) -> pa.RecordBatch:
    """Verified bytes as Arrow columns."""
    return pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(data)), schema(tuple(shape_zyx), codec))


def copy_rows(batch: pa.RecordBatch, start: int, stop: int, image_hu: np.ndarray, mask: np.ndarray) -> None:
    """The rows [start, stop), into contiguous int16 HU and uint8 masks (0, 1, IGNORE), [row, z, y, x]."""
    for name, out in (("image", image_hu), ("mask", mask)):
        column = batch.column(name)
        if pa.types.is_binary(column.type):
            for voxels, frame in zip(out, _frames(column, start, stop), strict=True):
                _unpack(frame, voxels)
        else:
            out[:] = column.to_numpy_ndarray()[start:stop]


def patches_of(data: Buffer, shape_zyx: Sequence[int], codec: Codec) -> list[Patch]:
    """The rows of a record batch."""
    batch = decode(data, shape_zyx, codec)
    shape = (batch.num_rows, *shape_zyx)
    images, masks = np.empty(shape, np.int16), np.empty(shape, np.uint8)
    copy_rows(batch, 0, batch.num_rows, images, masks)
    rest = batch.drop_columns(["image", "mask"]).to_pylist()
    for fields in rest:
        for name in ("centre_lps_mm", "spacing_mm"):
            fields[name] = tuple(fields[name])
    return [Patch(image, mask, **fields) for image, mask, fields in zip(images, masks, rest, strict=True)]


def _packed(voxels: np.ndarray, how: tuple[str, int, int]) -> bytes:
    codec, planes, level = how
    packed: bytes = blosc.compress(voxels.tobytes(), voxels.itemsize, level, planes, codec)
    return packed


def _frames(column: pa.BinaryArray, start: int, stop: int) -> list[pa.Buffer]:
    """Binary values in place; Arrow's own scalars would be copies, made while no other thread may run."""
    _, offsets, data = column.buffers()
    at = np.frombuffer(offsets, np.int32)[start : stop + 1].tolist()
    return [data.slice(begin, end - begin) for begin, end in pairwise(at)]


def _unpack(frame: pa.Buffer, out: np.ndarray) -> None:
    """Into contiguous memory, of which Blosc takes as much as the frame says."""
    if of_format_4 := _FORMAT_4.get(frame.slice(0, 4).to_pybytes()):
        voxels = pa.decompress(frame, out.nbytes, of_format_4)
        low, *high = np.frombuffer(voxels, np.uint8).reshape(out.itemsize, *out.shape)
        out[:] = low
        for one in high:
            out += np.left_shift(one, 8, dtype=np.int16)
        return
    if blosc.get_cbuffer_sizes(frame)[:2] != (out.nbytes, frame.size) or not out.flags.c_contiguous:
        raise ValueError(f"a frame of {frame.size} bytes is not of {out.nbytes} contiguous ones")
    blosc.decompress_ptr(frame, out.ctypes.data)


def _to_arrow(group: Sequence[Patch], layout: pa.Schema, codec: Codec) -> pa.RecordBatch:
    def column(field: pa.Field) -> pa.Array:
        if field.name not in ("image", "mask"):
            return pa.array([getattr(patch, field.name) for patch in group], field.type)
        voxels = [patch.image_hu if field.name == "image" else patch.mask for patch in group]
        if not pa.types.is_binary(field.type):
            return pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(voxels))
        how = _IMAGES[codec] if field.name == "image" else _MASKS
        return pa.array([_packed(one, how) for one in voxels], field.type)

    return pa.record_batch([column(field) for field in layout], schema=layout)
