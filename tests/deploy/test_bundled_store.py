"""The bundled store's command line and key, given to the real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from ray._private.ray_constants import RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S

PLAIN = Config(
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    retries={"max_attempts": 1},
)


@pytest.fixture(scope="module")
def store(
    render: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    """Endpoint and Secret of a server run as by the chart, but for folders, ports and address."""
    documents = {one["kind"]: one for one in render("lungseg", "--set=objectStore.bundled.enabled=true")}
    secret = {key: b64decode(value).decode() for key, value in documents["Secret"]["data"].items()}
    (container,) = documents["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    folder = tmp_path_factory.mktemp("store")
    s3, master, volume, filer = _free_ports(4)
    changed = {
        "-dir": str(folder),
        "-s3.port": str(s3),
        "-s3.ip.bind": "127.0.0.1",
        "-master.port": str(master),
        "-volume.port": str(volume),
        "-filer.port": str(filer),
    }
    kept = [argument for argument in container["args"] if argument.partition("=")[0] not in changed]
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    with (folder / "log").open("w") as log:
        arguments = [*kept, *(f"{flag}={value}" for flag, value in changed.items())]
        variables = {one["name"]: secret[one["valueFrom"]["secretKeyRef"]["key"]] for one in container["env"]}
        environment = {**os.environ, **variables}
        server = subprocess.Popen([weed, *arguments], stdout=log, stderr=log, cwd=folder, env=environment)
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        _wait_until_ready(endpoint + container["readinessProbe"]["httpGet"]["path"], server, folder / "log")
        yield endpoint, secret
    finally:
        server.kill()  # it takes half a minute over SIGTERM, and there is nothing to keep
        server.wait(timeout=20)


def _free_ports(count: int) -> list[int]:
    """Ports p with p and p + 10000 free; the second is where SeaweedFS puts the gRPC twin."""
    found: list[int] = []
    for port in range(21000, 45000, 7):
        with socket.socket() as one, socket.socket() as twin:
            try:
                one.bind(("127.0.0.1", port))
                twin.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found


def _wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(150):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(log.read_text()[-2000:])


def client(endpoint: str, access_key: str, secret_key: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=PLAIN,
    )


def test_the_drawn_key_may_write_to_a_bucket_that_nobody_made(
    store: tuple[str, dict[str, str]],
) -> None:
    endpoint, secret = store
    s3 = client(endpoint, secret["AWS_ACCESS_KEY_ID"], secret["AWS_SECRET_ACCESS_KEY"])
    s3.put_object(Bucket="lungseg", Key="runs/first/run.json", Body=b"{}")
    assert s3.get_object(Bucket="lungseg", Key="runs/first/run.json")["Body"].read() == b"{}"


def test_nobody_else_may_read(store: tuple[str, dict[str, str]]) -> None:
    endpoint, secret = store
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client(endpoint, secret["AWS_ACCESS_KEY_ID"], "guessed").list_buckets()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{endpoint}/lungseg/runs/first/run.json", timeout=5)


def test_it_serves_on_while_workers_of_the_same_drained_node_commit(
    render: Callable[..., list[dict[str, Any]]],
) -> None:
    documents = render("lungseg", "--set=objectStore.bundled.enabled=true")
    (pod,) = (one["spec"]["template"]["spec"] for one in documents if one["kind"] == "StatefulSet")
    serves = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S <= serves < pod["terminationGracePeriodSeconds"]
