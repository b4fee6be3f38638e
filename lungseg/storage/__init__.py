"""One store over a folder or `s3://bucket/prefix`: the only room that knows which of the two it is.

Keys are relative, with `/`. Objects are immutable by convention: what must appear once is written by
`put_if_absent`, and what names other objects is written last. Credentials come from the environment
(`AWS_*`, `AWS_ENDPOINT_URL`) and are never held in an attribute, so a pickled store carries none.
"""

from __future__ import annotations

from pathlib import Path

from lungseg.errors import ConfigError
from lungseg.storage import keys
from lungseg.storage.base import Patience, Read, ReadCancelled, Store, StoredObject, to_json
from lungseg.storage.folder import FolderStore
from lungseg.storage.s3 import S3Store

__all__ = [
    "FolderStore",
    "Patience",
    "Read",
    "ReadCancelled",
    "S3Store",
    "Store",
    "StoredObject",
    "keys",
    "open_store",
    "to_json",
]


def open_store(uri: str | Path) -> Store:
    """The store of a URI. Does no I/O. Raises ConfigError("store-uri")."""
    text = str(uri)
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError("store-uri", store=text, remedy="write s3://bucket/prefix")
        return S3Store(bucket, prefix.strip("/"))
    if "://" in text and not text.startswith("file://"):
        raise ConfigError("store-uri", store=text, remedy="a store is a folder or s3://bucket/prefix")
    return FolderStore(Path(text.removeprefix("file://")).expanduser().absolute())
