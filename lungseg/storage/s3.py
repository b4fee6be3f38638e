"""A store in a bucket of any S3-compatible server."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lungseg.errors import StorageError
from lungseg.storage.base import Patience, Read, Store, StoredObject, missing, truncated, whole
from lungseg.storage.s3_connections import Watched, read_pool, s3_client
from lungseg.storage.s3_errors import code_of, may_pass, without_url

if TYPE_CHECKING:
    import urllib3

_log = logging.getLogger("lungseg.storage")
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
        self._met = False

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.bucket, self.prefix.rstrip("/")), {"_met": self._met}

    @cached_property
    def client(self) -> Any:
        return s3_client()

    @cached_property
    def pool(self) -> urllib3.PoolManager:
        return read_pool(self.client.meta.endpoint_url)

    def renew(self) -> None:
        if "client" in self.__dict__:  # made already
            self.client.close()  # reads of other threads that are under way go on
        if "pool" in self.__dict__:
            self.pool.clear()

    def check(self) -> None:
        try:
            self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        except Exception as error:
            raise self._failure(error, "") from error

    def folders(self, prefix: str) -> list[str]:
        found = self._pages(prefix, Delimiter="/")
        names = [item["Prefix"] for page in found for item in page.get("CommonPrefixes", ())]
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
        def fill(answer: Any) -> int:
            from urllib3.exceptions import IncompleteRead

            # http.client's own answer, from the socket into `out`: urllib3 copies all twice more on the way.
            body, found = answer._fp, 0
            while more := body.readinto(out[found:]):
                found += more
            if body.length:
                raise IncompleteRead(found, body.length)
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
                wait = next(waits, None) if may_pass(error) else None
                if wait is None:
                    raise self._failure(error, key, offset=start) from error
                if read.attempts == 1:
                    _log.warning("reading %s at %d again: %s", key, start, without_url(error))
            self.pool.clear()  # what is pooled may lead to a server that is gone
            read.pause(wait)

    def _attempt(self, key: str, ranged: str | None, read: Read, take: Callable[[Any], Any]) -> Any:
        """Raises ClientError for a refusal, as boto3 would."""
        import urllib3
        from botocore.exceptions import ClientError

        patience = read.patience
        Watched.of_thread.read = read
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
            self._met = True
        finally:
            read.waits_on(None)
            del Watched.of_thread.read
        if refused:
            code = code_of(taken) or f"HTTP status {answer.status}"
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
        url = self.client.generate_presigned_url("get_object", Params=self._address(key), ExpiresIn=3600)
        self._urls[key] = url, time.monotonic() + _URL_SECONDS
        return url

    def put(self, key: str, data: bytes | Path) -> None:
        address = self._address(key)
        if isinstance(data, Path):
            self._patiently(key, lambda: self.client.upload_file(str(data), **address))
        else:
            self._patiently(key, lambda: self.client.put_object(Body=data, **address))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        tries = 0

        def claim() -> bool:
            nonlocal tries
            tries += 1
            try:
                self.client.put_object(Body=data, IfNoneMatch="*", **self._address(key))
            except ClientError as error:
                answer = error.response["ResponseMetadata"]
                if answer.get("HTTPStatusCode") not in (409, 412):
                    raise
                # Whoever repeats a PUT whose answer was lost is told that the object is there. It is ours
                # if its bytes are: run.json, claims and checkpoints hold something random.
                repeated = tries > 1 or bool(answer.get("RetryAttempts"))
                return repeated and self.get(key) == data
            return True

        return bool(self._patiently(key, claim))

    def size(self, key: str) -> int | None:
        try:
            found = self._patiently(key, partial(self.client.head_object, **self._address(key)))
            return int(found["ContentLength"])
        except StorageError as failure:
            if failure.code == "object-missing":
                return None
            raise

    def find(self, prefix: str = "") -> Iterator[StoredObject]:
        for page in self._pages(prefix):
            for item in page.get("Contents", ()):
                yield StoredObject(item["Key"][len(self.prefix) :], item["Size"])

    def delete(self, keys: Iterable[str]) -> None:
        # One by one: several S3-compatible servers demand a Content-MD5 that boto3 no longer sends
        # with DeleteObjects.
        for key in keys:
            self._patiently(key, partial(self.client.delete_object, **self._address(key)))

    def _address(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _pages(self, prefix: str, **query: Any) -> Iterator[dict[str, Any]]:
        query |= {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        while True:
            page = self._patiently(prefix, lambda: self.client.list_objects_v2(**query))
            yield page
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def _patiently(self, key: str, call: Callable[[], Any]) -> Any:
        """What `call`, which may be repeated, gives in the end: it is tried again for as long as a read.

        Only of a server that has answered before: one that never did is more likely a wrong address."""
        waits, first = Patience().waits(), True
        while True:
            try:
                answer = call()
                self._met = True
                return answer
            except StorageError:
                raise  # of a read, which was patient itself
            except Exception as error:
                wait = next(waits, None) if self._met and may_pass(error) else None
                if wait is None:
                    raise self._failure(error, key) from error
                if first:
                    _log.warning("asking the store again for %s: %s", key, without_url(error))
            first = False
            time.sleep(wait)

    def _failure(self, error: Exception, key: str, **where: Any) -> StorageError:
        """One of our errors for whatever the client raised; unknown kinds are passed on as they are."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
        from urllib3.exceptions import HTTPError

        if isinstance(error, ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                remedy = f"create the bucket {self.bucket!r}, or correct --store"
                return StorageError("store-missing", store=self.uri, message="no such bucket", remedy=remedy)
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
        if isinstance(error, BotoCoreError | HTTPError | OSError | S3UploadFailedError):
            remedy = "check AWS_ENDPOINT_URL and that the server runs, then start the same command again"
            return StorageError(
                "store-unreachable", store=self.uri, key=key, **where,
                message=without_url(error), remedy=remedy,
            )  # fmt: skip
        raise error
