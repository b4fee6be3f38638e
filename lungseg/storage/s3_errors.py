"""What the errors of boto3, urllib3 and the sockets below them mean."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no answer or half of one, a server's own failure (5xx),
    and the two 4xx that mean just that (408 request timeout, 429 too many requests)."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, Exception):
        return may_pass(error.__context__)
    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return status >= 500 or status in (408, 429)
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error)):
        return False
    return isinstance(error, HTTPError | HTTPClientError | OSError)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was made of or raised in handling."""
    todo, seen = [error], list[BaseException]()
    while todo:
        one = todo.pop()
        if one not in seen:
            yield one
            seen.append(one)
            told = [one.__cause__, one.__context__, *one.args]
            todo += [cause for cause in told if isinstance(cause, BaseException)]


def without_url(error: Exception) -> str:
    """What went wrong, without the query of a presigned URL: whoever has it may read the object."""
    return str(error).partition("?X-Amz-")[0]


def code_of(body: bytes) -> str:
    """The code in S3's XML; empty where a proxy on the way answered in its own words."""
    found = re.search(rb"<Code>(\w+)</Code>", body)
    return found[1].decode() if found else ""
