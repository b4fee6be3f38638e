"""One real S3 server and one local Ray for each process of the suite that asks for them."""

from __future__ import annotations

import os
import secrets
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.scraping import Endpoint
from helpers.servers import BUCKET, REAL_DATA, S3Server, free_ports, s3_client
from helpers.turns import group, in_turn, is_alone, its_turn
from hypothesis import settings

# In CI the same examples each time: a rare one must be found at a desk, not block what it has no part in.
settings.register_profile("ci", derandomize=True, deadline=None)
# At a desk, for the tests that leave the number of examples to the profile: --hypothesis-profile=thorough.
settings.register_profile("thorough", max_examples=5000, deadline=None)
# Without it the tests would make a key in the home folder of who runs them.
os.environ["LUNGSEG_CASE_KEY"] = "the key of the tests, no secret"
# How long Ray Train sleeps between two looks at its workers: its 2 s come again at each start and end.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
if os.environ.get("CI"):
    settings.load_profile("ci")
# A shell lets what it starts in the background ignore Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One file runs in this process. More are spread over one process beyond the cores, since many wait for a
    server, though not so far that each imports TensorFlow anew."""
    one_file = len(config.args) == 1 and ".py" in config.args[0]
    return 0 if one_file else min((os.cpu_count() or 1) + 1, 4)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = in_turn(items)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with its_turn(is_alone(item)):
        return (yield)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running server with an empty bucket; its credentials are in the environment of this process,
    and so of every Ray worker and command that is started after it."""
    server = S3Server(tmp_path_factory.mktemp("seaweedfs"))
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    server.start()
    try:
        s3_client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def s3_uri(s3_server: S3Server) -> str:
    """An empty prefix of the bucket, one a test."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture
def refusing_port() -> Iterator[int]:
    """Where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and not listening: nobody else gets the port
        yield closed.getsockname()[1]


@pytest.fixture
def refusing_server(monkeypatch: pytest.MonkeyPatch, refusing_port: int) -> None:
    """AWS_ENDPOINT_URL names a port where nobody listens."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[Any]:
    """The local Ray that lungseg itself starts; it starts after the S3 server to know its address."""
    from lungseg.cluster import connect

    ray = connect()
    yield ray
    ray.shutdown()


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"real CT is not at {REAL_DATA}: fetch the CT samples that its README lists")
    return REAL_DATA


@pytest.fixture(scope="session")
def endpoint(ray_cluster: Any) -> Endpoint:
    """Where the metrics of the session's Ray are served: there is one exporter a cluster."""
    from lungseg.exporter import start_exporter

    found = Endpoint(*free_ports(1))
    assert start_exporter(found.config) is not None
    return found
