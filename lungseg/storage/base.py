"""What every store can do, and what is alike in all of them."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungseg.errors import StorageError


@dataclass(frozen=True)
class StoredObject:
    key: str
    size_bytes: int


class Store(ABC):
    """Bytes under keys. Every method raises StorageError ("object-missing", "store-unreachable",
    "store-refused")."""

    uri: str

    @abstractmethod
    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The object, or `length` bytes of it from `start`; never fewer than asked for."""

    @abstractmethod
    def put(self, key: str, data: bytes | Path) -> None:
        """Write or replace; a reader sees the old object or the new one, never a part."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists. Of several writers exactly one gets True, provided that their bytes
        differ: where an answer got lost, equal bytes are taken for one's own."""

    @abstractmethod
    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""

    @abstractmethod
    def find(self, prefix: str = "") -> Iterator[StoredObject]:
        """Objects whose key starts with `prefix`, in lexical order."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove; a key that is not there is no error."""

    @abstractmethod
    def renew(self) -> None:
        """Forget pooled connections: the next request opens a new one."""

    @abstractmethod
    def check(self) -> None:
        """Raise StorageError("store-missing", "store-unreachable", "store-refused") if it cannot be read."""

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def folders(self, prefix: str) -> list[str]:
        """Names directly under `prefix` (which ends with "/") that have objects below them."""
        names = (item.key[len(prefix) :].partition("/") for item in self.find(prefix))
        return list(dict.fromkeys(head for head, slash, _ in names if slash))

    def get_json(self, key: str) -> Any:
        """A JSON object. Raises StorageError("object-corrupt") if it does not parse."""
        try:
            return json.loads(self.get(key))
        except ValueError as error:
            raise StorageError(
                "object-corrupt", store=self.uri, key=key, remedy="restore it from a copy, or write it again"
            ) from error

    def put_json(self, key: str, value: Any) -> None:
        self.put(key, to_json(value))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"


def to_json(value: Any) -> bytes:
    """Canonical, so that equal values have equal bytes; NaN is refused, since JSON has none."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def missing(store: Store, key: str) -> StorageError:
    return StorageError("object-missing", store=store.uri, key=key, remedy="check the name and --store")


def whole(store: Store, key: str, start: int, length: int | None, data: bytes) -> bytes:
    if length is not None and len(data) != length:
        raise StorageError(
            "object-truncated",
            store=store.uri,
            key=key,
            offset=start,
            message=f"{len(data)} of {length} bytes",
            remedy="the object was cut short: write it again",
        )
    return data
