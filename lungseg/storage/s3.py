"""A store in a bucket of any S3-compatible server."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lungseg.errors import StorageError
from lungseg.storage.base import Store, StoredObject, missing, whole


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
                return missing(self, key)
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
