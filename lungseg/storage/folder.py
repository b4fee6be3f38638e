"""A store in a plain folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lungseg.errors import StorageError
from lungseg.storage.base import DISK_FULL, Read, Store, StoredObject, missing, whole

_TEMPORARY = ".lungseg-tmp-"


class FolderStore(Store):
    """A plain folder, made on the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise StorageError("store-refused", store=self.uri, key=key, remedy="keys are relative")
        return self.root / key

    def renew(self) -> None:
        pass  # a folder has no connections

    def check(self) -> None:
        if not self.root.is_dir():
            remedy = "correct --store or LUNGSEG_STORE, or fill it with `lungseg prepare`"
            raise StorageError("store-missing", store=self.uri, message="no such folder", remedy=remedy)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                file.seek(start)
                data = file.read() if length is None else file.read(length)
        except OSError as error:
            raise self._failure(error, key) from error
        whole(self, key, start, length, len(data))
        return data

    def get_into(self, key: str, start: int, out: memoryview, read: Read | None = None) -> None:
        read = read or Read()
        read.attempts += 1
        read.check()
        try:
            with self._path(key).open("rb", buffering=0) as file:
                file.seek(start)
                found = 0
                while found < len(out) and (more := file.readinto(out[found:])):
                    found += more
        except OSError as error:
            raise self._failure(error, key) from error
        whole(self, key, start, len(out), found)

    def put(self, key: str, data: bytes | Path) -> None:
        with _writing(self, key) as temporary:
            _fill(temporary, data)
            os.replace(temporary, self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with _writing(self, key) as temporary:
            _fill(temporary, data)
            try:
                os.link(temporary, self._path(key))  # fails if the name exists, also across processes
            except FileExistsError:
                return False
            return True

    def size(self, key: str) -> int | None:
        try:
            path = self._path(key)
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failure(error, key) from error

    def find(self, prefix: str = "") -> Iterator[StoredObject]:
        found = []
        # Unlike rglob, os.walk does not mind folders and files that another process deletes meanwhile.
        for folder, _, names in os.walk(self._path(prefix.rpartition("/")[0])):
            for path in (Path(folder, name) for name in names if not name.startswith(_TEMPORARY)):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):
                        found.append(StoredObject(key, path.stat().st_size))
        yield from sorted(found, key=lambda item: item.key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            path.unlink(missing_ok=True)
            # S3 has no empty folders; neither have we.
            for parent in path.parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except FileNotFoundError:
                    continue  # another process was quicker
                except OSError:
                    break  # it holds something

    def _failure(self, error: OSError, key: str) -> StorageError:
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return missing(self, key)
        if error.errno in DISK_FULL:
            remedy = "free space there, then start the same command again (train: with --resume)"
            return StorageError("store-full", store=self.uri, key=key, message=str(error), remedy=remedy)
        remedy = "check the folder's permissions"
        return StorageError("store-unreachable", store=self.uri, key=key, message=str(error), remedy=remedy)


def _temporary_in(folder: Path) -> tuple[int, str]:
    """As mkstemp, in a folder that is made first, and again if another process deletes it while empty."""
    for _ in range(20):
        with suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            return tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
    return tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)


class _writing:  # noqa: N801 - used like a function
    """A temporary file beside the target; removed on every way out."""

    def __init__(self, store: FolderStore, key: str) -> None:
        self.store, self.key = store, key

    def __enter__(self) -> Path:
        target = self.store._path(self.key)
        try:
            handle, name = _temporary_in(target.parent)
        except OSError as error:
            known = error.errno in DISK_FULL
            raise self.store._failure(error if known else PermissionError(str(error)), self.key) from error
        os.close(handle)
        os.chmod(name, 0o644)
        self.temporary = Path(name)
        return self.temporary

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise self.store._failure(error, self.key) from error


def _fill(path: Path, data: bytes | Path) -> None:
    with path.open("wb") as file:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a manifest must not outlive the data it names
