"""One store over a folder or `s3://bucket/prefix`: the only room that knows which of the two it is.

Keys are relative, with `/`. Objects are immutable by convention: what must appear once is written by
`put_if_absent`, and what names other objects is written last. Credentials come from the environment
(`AWS_*`, `AWS_ENDPOINT_URL`) and are never held in an attribute, so a pickled store carries none.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lungseg.errors import ConfigError, StorageError

_TEMPORARY = ".lungseg-tmp-"


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
        """Write unless the key exists. Of several writers exactly one gets True."""

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
        return _full(self, key, start, length, data)

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
        folder = self._path(prefix.rpartition("/")[0])
        found = []
        for path in folder.rglob("*"):
            if path.name.startswith(_TEMPORARY) or not path.is_file():
                continue
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix):
                found.append(StoredObject(key, path.stat().st_size))
        yield from sorted(found, key=lambda item: item.key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            path.unlink(missing_ok=True)
            # S3 has no empty folders; neither have we.
            for parent in path.parents:
                if parent == self.root or not parent.is_dir() or any(parent.iterdir()):
                    break
                parent.rmdir()

    def _failure(self, error: OSError, key: str) -> StorageError:
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            return _missing(self, key)
        remedy = "check the folder's permissions and free space"
        return StorageError("store-unreachable", store=self.uri, key=key, message=str(error), remedy=remedy)


class _writing:  # noqa: N801 - used like a function
    """A temporary file beside the target; removed on every way out."""

    def __init__(self, store: FolderStore, key: str) -> None:
        self.store, self.key = store, key

    def __enter__(self) -> Path:
        target = self.store._path(self.key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=target.parent)
        except OSError as error:
            raise self.store._failure(PermissionError(str(error)), self.key) from error
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


class S3Store(Store):
    """Any S3-compatible server; one pooled client a process, made on first use."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix + "/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix.rstrip("/"))

    @property
    def client(self) -> Any:
        client = self._client  # another thread may `renew` at any moment
        if client is None:
            client = self._client = _s3_client()
        return client

    def renew(self) -> None:
        self._client = None

    def check(self) -> None:
        next(self.find(), None)

    def folders(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2")
        try:
            found = pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix, Delimiter="/")
            names = [item["Prefix"] for page in found for item in page.get("CommonPrefixes", ())]
        except Exception as error:
            raise self._failure(error, prefix) from error
        return [name[len(self.prefix + prefix) : -1] for name in names]

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        end = "" if length is None else start + length - 1
        ranged = {} if start == 0 and length is None else {"Range": f"bytes={start}-{end}"}
        try:
            data = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, **ranged)["Body"].read()
        except Exception as error:
            raise self._failure(error, key) from error
        return _full(self, key, start, length, data)

    def put(self, key: str, data: bytes | Path) -> None:
        try:
            if isinstance(data, Path):
                self.client.upload_file(str(data), self.bucket, self.prefix + key)
            else:
                self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)
        except Exception as error:
            raise self._failure(error, key) from error

    def put_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response["ResponseMetadata"].get("HTTPStatusCode") in (409, 412):
                return False
            raise self._failure(error, key) from error
        except Exception as error:
            raise self._failure(error, key) from error
        return True

    def size(self, key: str) -> int | None:
        try:
            return int(self.client.head_object(Bucket=self.bucket, Key=self.prefix + key)["ContentLength"])
        except Exception as error:
            failure = self._failure(error, key)
            if failure.code == "object-missing":
                return None
            raise failure from error

    def find(self, prefix: str = "") -> Iterator[StoredObject]:
        pages = self.client.get_paginator("list_objects_v2")
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for item in page.get("Contents", ()):
                    yield StoredObject(item["Key"][len(self.prefix) :], item["Size"])
        except Exception as error:
            raise self._failure(error, prefix) from error

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: several S3-compatible servers demand a Content-MD5 that boto3 no longer sends
        # with DeleteObjects.
        for key in keys:
            try:
                self.client.delete_object(Bucket=self.bucket, Key=self.prefix + key)
            except Exception as error:
                raise self._failure(error, key) from error

    def _failure(self, error: Exception, key: str) -> StorageError:
        """One of our errors for whatever the client raised; unknown kinds are passed on as they are."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from urllib3.exceptions import HTTPError

        if isinstance(error, ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                remedy = f"create the bucket {self.bucket!r}, or correct --store"
                return StorageError(
                    "store-unreachable", store=self.uri, message="no such bucket", remedy=remedy
                )
            if status == 404:
                return _missing(self, key)
            if status in (401, 403):
                remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
                return StorageError("store-refused", store=self.uri, key=key, message=code, remedy=remedy)
            remedy = "check the store's health, then start the same command again"
            return StorageError("store-unreachable", store=self.uri, key=key, message=code, remedy=remedy)
        if isinstance(error, NoCredentialsError):
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return StorageError("store-refused", store=self.uri, message="no credentials", remedy=remedy)
        if (
            isinstance(error, BotoCoreError | HTTPError | OSError)
            or type(error).__name__ == "S3UploadFailedError"
        ):
            remedy = "check AWS_ENDPOINT_URL and that the server runs, then start the same command again"
            return StorageError("store-unreachable", store=self.uri, message=str(error), remedy=remedy)
        raise error


def _s3_client() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=64,
        retries={"mode": "standard", "total_max_attempts": 6},
        # Many S3-compatible servers know no trailing checksums; shards carry their own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.session.Session(region_name=region).client("s3", config=config)


def _missing(store: Store, key: str) -> StorageError:
    return StorageError("object-missing", store=store.uri, key=key, remedy="check the name and --store")


def _full(store: Store, key: str, start: int, length: int | None, data: bytes) -> bytes:
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
