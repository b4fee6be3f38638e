"""How an S3-compatible server is reached: boto3's client, and the connections that reads go through."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import urllib3


def s3_client() -> Any:
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


class Watched:
    """Of a connection: tells the read of this thread which socket it waits on."""

    of_thread = threading.local()
    sock: Any

    def request(self, *args: Any, **kwargs: Any) -> None:
        super().request(*args, **kwargs)  # type: ignore[misc]
        self.of_thread.read.waits_on(self.sock)


def read_pool(endpoint: str) -> urllib3.PoolManager:
    """Connections with the proxies and certificates that boto3 would use."""
    import urllib3
    from botocore.httpsession import get_cert_path
    from botocore.session import get_session
    from botocore.utils import get_environ_proxies
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Plain(urllib3.HTTPConnectionPool):
        ConnectionCls = type("Plain", (Watched, HTTPConnection), {})

    class Encrypted(urllib3.HTTPSConnectionPool):
        ConnectionCls = type("Encrypted", (Watched, HTTPSConnection), {})

    options: dict[str, Any] = {
        "maxsize": 256,  # connections that are kept; there are never more than threads that read
        "cert_reqs": "CERT_REQUIRED",
        "ca_certs": get_session().get_config_variable("ca_bundle") or get_cert_path(True),
    }
    proxy = get_environ_proxies(endpoint).get(endpoint.partition(":")[0])
    pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    pool.pool_classes_by_scheme = {"http": Plain, "https": Encrypted}
    return pool
