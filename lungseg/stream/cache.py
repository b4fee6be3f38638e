"""Fetched extents on a node's own disk, so that an epoch need not come over the network twice.

One folder serves all workers of a node, several runs at once, and the same run after a restart.

- An entry is a file that is named by what it must contain. It is written under a temporary name and renamed
  when it is whole. Whoever reads it verifies it again. It may vanish at any time.
- Processes have to agree on one thing: how many bytes there are. A file lock guards that number.
- A full cache takes nothing more, and evicts only what no run has read for an hour. Evicting what was used
  longest ago would be worse: a pass reads every extent once, in another order each time, so that would throw
  away what comes next. Of a data set twice as large as the cache, 15 % would be found again; of entries that
  simply stay, 50 % are.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lungseg.dataset.shards import Buffer, Extent, Shard
from lungseg.errors import ConfigError
from lungseg.telemetry import CHECKSUM_FAILURES, log

_TEMPORARY = ".writing-"
_FORGOTTEN_SECONDS = 600  # after which a temporary file belongs to nobody who lives
_IDLE_SECONDS = 3600  # after which an entry of another data set may go
_FULL_SECONDS = 60  # for which a cache found full is not looked through again


class DiskCache:
    """At most `limit_bytes` of extents; those of `shards`, the data set in use, are never evicted."""

    def __init__(self, folder: Path, limit_bytes: int, shards: Iterable[Shard]) -> None:
        self._folder, self._limit = folder.expanduser().absolute(), limit_bytes
        self._in_use = {_folder_of(shard) for shard in shards}
        self._total = self._folder / "bytes"
        self._full_until = 0.0

    def open(self) -> None:
        """Make the folder, remove what killed processes left, and count. Raises ConfigError("cache-dir")."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob(f"*/{_TEMPORARY}*"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS:
                        path.unlink()
            with self._locked():
                self._total.write_text(str(self._evict(0)))
        except OSError as error:
            remedy = "set stream.cache_dir to a folder that this user may write to, or to null"
            raise ConfigError("cache-dir", folder=self._folder, message=str(error), remedy=remedy) from error

    def get(self, extent: Extent, out: memoryview) -> bool:
        """Whether `out` now holds the verified bytes. An entry that has changed is counted and removed."""
        path = self._path(extent)
        try:
            with path.open("rb", buffering=0) as file:
                length = file.readinto(out)
            os.utime(path)
        except OSError:  # not there, or evicted just now
            return False
        if length == extent.length and extent.damage(out) is None:
            return True
        CHECKSUM_FAILURES.inc()
        path.unlink(missing_ok=True)
        return False

    def put(self, extent: Extent, data: Buffer) -> None:
        """Keep verified bytes if there is room. A disk that is full or broken costs only the benefit."""
        if time.monotonic() < self._full_until:
            return
        path = self._path(extent)
        try:
            path.parent.mkdir(exist_ok=True)
            with self._locked():
                if not self._has_room(len(data)):
                    self._full_until = time.monotonic() + _FULL_SECONDS
                    return
                handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
                os.truncate(handle, len(data))  # so that whoever counts next counts this
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                with self._locked():  # or a count might see neither name
                    os.replace(name, path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            self._full_until = float("inf")
            log("cache").warning("nothing more is cached in %s: %s", self._folder, error)

    def _path(self, extent: Extent) -> Path:
        return self._folder / _folder_of(extent.shard) / f"{extent.offset}-{extent.length}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl  # only where there is a cache: not every system has it

        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which the kernel lets go of if this process dies
            yield

    def _has_room(self, coming: int) -> bool:
        """Under the lock: add to the noted total, which is never below the true one, if there is room."""
        try:
            total = int(self._total.read_text())
        except (OSError, ValueError):
            total = self._limit
        if total + coming > self._limit:
            total = self._evict(coming)
        fits = total + coming <= self._limit
        self._total.write_text(str(total + coming * fits))
        return fits

    def _evict(self, coming: int) -> int:
        """Under the lock: make room for `coming` bytes of what nobody uses; the bytes that are there then."""
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for last_use, size, path in entries:
            if total + coming <= self._limit or time.time() - last_use < _IDLE_SECONDS:
                break
            if path.parent.name not in self._in_use:
                path.unlink(missing_ok=True)
                total -= size
        return total

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of every entry, also of those that are being written."""
        for path in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path


def _folder_of(shard: Shard) -> str:
    return shard.sha256[:32]
