"""A store in a bucket of any S3-compatible server."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungseg.errors import StorageError
from lungseg.storage.base import Read, Store, StoredObject, missing, truncated, whole

if TYPE_CHECKING:
    import urllib3

_log = logging.getLogger("lungseg.storage")
_PIECE = 1 << 18
_URL_SECONDS = 300.0  # below the ten minutes for which refreshed credentials are still good


class S3Store(Store):
    """Any S3-compatible server; pooled clients, made on first use.

    boto3 does everything but reads. It signs those too, once an object: the ranged GETs behind a presigned
    URL go through urllib3 alone, which takes half the CPU time of boto3's `get_object` and lets a read be
    cancelled.
    """

    remote = True

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix + "/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._urls: dict[str, tuple[str, float]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix.rstrip("/"))

    @cached_property
    def client(self) -> Any:
        return _s3_client()

    @cached_property
    def pool(self) -> urllib3.PoolManager:
        return _pool(self.client.meta.endpoint_url)

    def renew(self) -> None:
        if "client" in self.__dict__:  # made already
            self.client.close()  # reads of other threads that are under way go on
        if "pool" in self.__dict__:
            self.pool.clear()

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
        ranged = None if start == 0 and length is None else f"bytes={start}-{end}"
        data: bytes = self._answer(key, start, ranged, Read(), lambda answer: answer.read())
        whole(self, key, start, length, len(data))
        return data

    def get_into(self, key: str, start: int, out: memoryview, read: Read | None = None) -> None:
        def fill(answer: urllib3.BaseHTTPResponse) -> int:
            found = 0
            # In pieces that stay in the processor's cache: urllib3 copies them once more.
            while more := answer.readinto(out[found : found + _PIECE]):
                found += more
            return found

        ranged = f"bytes={start}-{start + len(out) - 1}"
        whole(self, key, start, len(out), self._answer(key, start, ranged, read or Read(), fill))

    def _answer(
        self, key: str, start: int, ranged: str | None, read: Read, take: Callable[[Any], Any]
    ) -> Any:
        """What `take` makes of the answer to a GET, tried again while that may help."""
        waits = read.patience.waits()  # its clock starts with the first failure
        while True:
            read.check()
            read.attempts += 1
            try:
                return self._attempt(key, ranged, read, take)
            except Exception as error:
                read.check()  # the failure is our own doing
                wait = next(waits, None) if _may_pass(error) else None
                if wait is None:
                    raise self._failure(error, key, offset=start) from error
                if read.attempts == 1:
                    _log.warning("reading %s at %d again: %s", key, start, _without_url(error))
            self.pool.clear()  # what is pooled may lead to a server that is gone
            read.pause(wait)

    def _attempt(self, key: str, ranged: str | None, read: Read, take: Callable[[Any], Any]) -> Any:
        """Raises ClientError for a refusal, as boto3 would."""
        import urllib3
        from botocore.exceptions import ClientError

        patience = read.patience
        _Watched.of_thread.read = read
        try:
            answer = self.pool.request(
                "GET",
                self._url(key),
                headers={"Range": ranged} if ranged else {},
                timeout=urllib3.Timeout(connect=patience.connect_seconds, read=patience.read_seconds),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                refused = answer.status != (206 if ranged else 200)
                taken = answer.read() if refused else take(answer)
            except BaseException:
                answer.close()
                raise
            answer.release_conn()
        finally:
            read.waits_on(None)
            del _Watched.of_thread.read
        if refused:
            code = _code_of(taken) or f"HTTP status {answer.status}"
            about = {"HTTPStatusCode": answer.status}
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": about}, "GetObject")
        return taken

    def _url(self, key: str) -> str:
        """Presigned. The range is not part of what is signed, so one URL serves a whole object."""
        url, until = self._urls.get(key, ("", 0.0))
        if time.monotonic() < until:
            return url
        if len(self._urls) > 10_000:
            self._urls.clear()
        place = {"Bucket": self.bucket, "Key": self.prefix + key}
        url = self.client.generate_presigned_url("get_object", Params=place, ExpiresIn=3600)
        self._urls[key] = url, time.monotonic() + _URL_SECONDS
        return url

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
            answer = error.response["ResponseMetadata"]
            if answer.get("HTTPStatusCode") in (409, 412):
                # botocore repeats a PUT whose answer was lost, and is then told that the object is there.
                # It is ours if its bytes are: run.json and checkpoints hold something random.
                return bool(answer.get("RetryAttempts")) and self.get(key) == data
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

    def _failure(self, error: Exception, key: str, **where: Any) -> StorageError:
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
                return missing(self, key)
            if status == 416:
                return truncated(self, key, "the object ends before", **where)
            if status in (401, 403):
                remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
                return StorageError("store-refused", store=self.uri, key=key, message=code, remedy=remedy)
            remedy = "check the store's health, then start the same command again"
            return StorageError(
                "store-unreachable", store=self.uri, key=key, **where, message=code, remedy=remedy
            )
        if isinstance(error, NoCredentialsError):
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            return StorageError("store-refused", store=self.uri, message="no credentials", remedy=remedy)
        if (
            isinstance(error, BotoCoreError | HTTPError | OSError)
            or type(error).__name__ == "S3UploadFailedError"
        ):
            remedy = "check AWS_ENDPOINT_URL and that the server runs, then start the same command again"
            return StorageError(
                "store-unreachable", store=self.uri, key=key, **where,
                message=_without_url(error), remedy=remedy,
            )  # fmt: skip
        raise error


def _may_pass(error: Exception) -> bool:
    """Whether the same read may succeed later: no answer or half of one, a server's own failure (5xx), and
    the two 4xx that mean just that (408 request timeout, 429 too many requests)."""
    from botocore.exceptions import ClientError
    from urllib3.exceptions import HTTPError

    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return status >= 500 or status in (408, 429)
    return isinstance(error, HTTPError | OSError) and "CERTIFICATE_VERIFY_FAILED" not in str(error)


def _without_url(error: Exception) -> str:
    """What went wrong, without the query of a presigned URL: whoever has it may read the object."""
    return str(error).partition("?X-Amz-")[0]


def _code_of(body: bytes) -> str:
    """The code in S3's XML; empty where a proxy on the way answered in its own words."""
    found = re.search(rb"<Code>(\w+)</Code>", body)
    return found[1].decode() if found else ""


def _s3_client() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=64,
        retries={"mode": "standard", "total_max_attempts": 6},
        signature_version="s3v4",  # also for presigned URLs, where older ways are the default
        # Many S3-compatible servers know no trailing checksums; shards carry their own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.session.Session(region_name=region).client("s3", config=config)


class _Watched:
    """Of a connection: tells the read of this thread which socket it waits on."""

    of_thread = threading.local()
    sock: Any

    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)  # type: ignore[misc]
        self.of_thread.read.waits_on(self.sock)


def _pool(endpoint: str) -> urllib3.PoolManager:
    """Connections with the proxies and certificates that boto3 would use."""
    import urllib3
    from botocore.httpsession import get_cert_path
    from botocore.session import get_session
    from botocore.utils import get_environ_proxies
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Plain(urllib3.HTTPConnectionPool):
        ConnectionCls = type("Plain", (_Watched, HTTPConnection), {})

    class Encrypted(urllib3.HTTPSConnectionPool):
        ConnectionCls = type("Encrypted", (_Watched, HTTPSConnection), {})

    options: dict[str, Any] = {
        "maxsize": 256,  # connections that are kept; there are never more than threads that read
        "cert_reqs": "CERT_REQUIRED",
        "ca_certs": get_session().get_config_variable("ca_bundle") or get_cert_path(True),
    }
    proxy = get_environ_proxies(endpoint).get(endpoint.partition(":")[0])
    pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    pool.pool_classes_by_scheme = {"http": Plain, "https": Encrypted}
    return pool
