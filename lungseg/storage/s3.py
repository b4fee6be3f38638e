"""A store in a bucket of any S3-compatible server."""

from __future__ import annotations

import itertools
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lungseg.errors import StorageError
from lungseg.storage.base import Store, StoredObject, missing, whole

_log = logging.getLogger("lungseg.storage")
# Not the global generator: a seeded run would have all its workers wait alike, and come back at once.
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class Patience:
    """How long a read is tried again, from its first failure on, before it is given up.

    A server that is killed and started again is away for half a minute or more, most of which it spends
    on electing a leader; two minutes outlive that with a margin, and cost less than a restart of all
    workers. About 50 attempts fill them, so the bound on attempts only stops what fails at once.
    """

    attempts: int = 100
    seconds: float = 120.0
    first_wait_seconds: float = 0.2
    longest_wait_seconds: float = 5.0
    connect_seconds: float = 5.0
    # Between two pieces of an answer. Stores send the first byte within a second; whatever takes ten
    # is faster on a new connection, and all GPUs wait for the slowest read.
    read_seconds: float = 10.0

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


PATIENCE = Patience()


class S3Store(Store):
    """Any S3-compatible server; pooled clients, made on first use."""

    def __init__(self, bucket: str, prefix: str, patience: Patience = PATIENCE) -> None:
        self.bucket, self.prefix = bucket, prefix + "/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.patience = patience

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix.rstrip("/"), self.patience)

    @cached_property
    def client(self) -> Any:
        """For everything but reads; botocore repeats what fails."""
        return _s3_client(attempts=6, connect_seconds=5, read_seconds=60)

    @cached_property
    def reader(self) -> Any:
        """For reads, which `get` repeats: botocore's own attempts end where the body begins."""
        patience = self.patience
        return _s3_client(1, patience.connect_seconds, patience.read_seconds)

    def renew(self) -> None:
        for name in ("client", "reader"):
            if name in self.__dict__:  # made already
                getattr(self, name).close()  # reads of other threads that are under way go on

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
        place = {"Bucket": self.bucket, "Key": self.prefix + key, **ranged}
        waits = self.patience.waits()  # its clock starts with the first failure
        for attempt in itertools.count(1):
            try:
                data = self.reader.get_object(**place)["Body"].read()
                break
            except Exception as error:
                wait = next(waits, None) if _may_pass(error) else None
                if wait is None:
                    raise self._failure(error, key, offset=start) from error
                if attempt == 1:
                    _log.warning("reading %s at %d again: %s", key, start, error)
            self.reader.close()  # what is pooled may lead to a server that is gone
            time.sleep(wait)
        return whole(self, key, start, length, data)

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
                "store-unreachable", store=self.uri, key=key, **where, message=str(error), remedy=remedy
            )
        raise error


def _may_pass(error: Exception) -> bool:
    """Whether the same read may succeed later: no answer or half of one, a server's own failure (5xx), and
    the two 4xx that mean just that (408 request timeout, 429 too many requests)."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429)
    return isinstance(error, ConnectionError | HTTPClientError | IncompleteReadError | HTTPError | OSError)


def _s3_client(attempts: int, connect_seconds: float, read_seconds: float) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=connect_seconds,
        read_timeout=read_seconds,
        max_pool_connections=64,
        retries={"mode": "standard", "total_max_attempts": attempts},
        # Many S3-compatible servers know no trailing checksums; shards carry their own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return boto3.session.Session(region_name=region).client("s3", config=config)
