"""What every store can do, and what is alike in all of them."""

from __future__ import annotations

import errno
import json
import random
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungseg.errors import StorageError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class StoredObject:
    key: str
    size_bytes: int


# Not the global generator: a seeded run would have all its workers wait alike, and come back at once.
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class Patience:
    """How long a read is tried again, from its first failure on, before it is given up.

    About 50 attempts fill the default two minutes, so the bound on attempts only stops what fails at once.
    """

    seconds: float = 120.0
    connect_seconds: float = 5.0
    read_seconds: float = 10.0
    attempts: int = 100
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 5.0

    def waits(self) -> Iterator[float]:
        """Seconds to sleep before each further attempt: exponential backoff with full jitter (Brooker,
        "Exponential Backoff And Jitter", 2015). The last attempt comes no sooner than `seconds` after
        the first failure, unless `attempts` run out."""
        deadline = time.monotonic() + self.seconds
        for failures in range(self.attempts - 1):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            longest = min(self.longest_wait_seconds, self.first_wait_seconds * 2**failures)
            yield min(left, _jitter.uniform(0, longest))


class ReadCancelled(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The read was given up by `Read.cancel`."""


class Read:
    """One read as other threads may see it: how often it was tried, and a way to give it up at once."""

    def __init__(self, patience: Patience | None = None) -> None:
        self.patience = patience or Patience()
        self.attempts = 0
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def cancel(self) -> None:
        """Make the read end with ReadCancelled, wherever it is; one that has ended is left alone."""
        with self._lock:
            self._cancelled.set()
            if self._socket:
                try:
                    # Of the base class, for TLS too: SSLSocket's own would disturb the thread that reads.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
                except OSError:
                    pass  # closed already

    def waits_on(self, sock: socket.socket | None) -> None:
        """Told by the store: the socket that the answer comes from, None once it is here."""
        with self._lock:
            self._socket = sock
        if sock:
            self.check()

    def check(self) -> None:
        if self._cancelled.is_set():
            raise ReadCancelled

    def pause(self, seconds: float) -> None:
        """Sleep, unless the read is cancelled."""
        self._cancelled.wait(seconds)
        self.check()


class Store(ABC):
    """Bytes under keys. Every method raises StorageError ("object-missing", "store-unreachable",
    "store-refused", "store-full")."""

    uri: str
    remote = False
    """Whether a read may be slow for no reason of its own, so that a second one beside it makes sense."""

    @abstractmethod
    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """The object, or `length` bytes of it from `start`; never fewer than asked for."""

    @abstractmethod
    def get_into(self, key: str, start: int, out: memoryview, read: Read | None = None) -> None:
        """Fill `out` with the object's bytes from `start`; what it holds after an error is undefined.

        Raises ReadCancelled if `read` is cancelled."""

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


def truncated(store: Store, key: str, message: str, **where: Any) -> StorageError:
    remedy = "the object was cut short: write it again"
    return StorageError("object-truncated", store=store.uri, key=key, **where, message=message, remedy=remedy)


def whole(store: Store, key: str, start: int, length: int | None, found: int) -> None:
    """Raises StorageError("object-truncated") if `length` bytes were asked for, and others found."""
    if length is not None and found != length:
        raise truncated(store, key, f"{found} of {length} bytes", offset=start)
