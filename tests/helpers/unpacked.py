"""Everything that an object says: its key, its bytes, and what they hold compressed."""

from __future__ import annotations

import base64
import gzip
import io
import re
import zipfile
from collections.abc import Iterator

import pyarrow as pa

BASE64 = re.compile(rb"[A-Za-z0-9+/]{1000,}={0,2}")


def unpacked(key: str, data: bytes) -> Iterator[bytes]:
    """Of Arrow files the schema's metadata and every column's buffers, of gzip and zip what is in them."""
    yield key.encode()
    if key.endswith(".html"):  # among megabytes of letters four in a row are some word by chance
        yield BASE64.sub(b"", data)
        for letters in BASE64.findall(data):
            yield from unpacked("", base64.b64decode(letters.rstrip(b"=") + b"=="))
        return
    yield data
    if key.endswith(".arrow"):
        with pa.ipc.open_file(pa.BufferReader(data)) as reader:
            yield str(reader.schema).encode()
            yield from (reader.schema.metadata or {}).values()
            for number in range(reader.num_record_batches):
                for column in reader.get_batch(number).columns:
                    yield from (buffer.to_pybytes() for buffer in column.buffers() if buffer)
    elif data.startswith(b"\x1f\x8b"):
        yield data[:200]  # the header may name a file
        yield gzip.decompress(data)
    elif data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield from unpacked(name, archive.read(name))
