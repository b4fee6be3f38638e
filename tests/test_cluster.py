"""Reaching Ray: an address that is none, one where nobody listens, and homes and folders that Ray cannot use.

Each in a process of its own, since the session has a Ray already.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lungseg.cluster import _wait_for_answer, _whole_or_nothing, await_store
from lungseg.errors import StorageError
from lungseg.telemetry import log


def connect(**environment: str) -> tuple[str, float]:
    """The last line that who connects prints, and its seconds."""
    script = "from lungseg.cluster import connect; print(len(connect().nodes()), 'node')"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return (done.stdout or done.stderr).strip().rpartition("\n")[2], time.monotonic() - began


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example", "head", "head:port"])
def test_an_address_of_another_kind_is_told_with_the_right_one(address: str) -> None:
    line, _ = connect(RAY_ADDRESS=address)
    assert "cluster-address" in line
    assert "HOST:6379" in line


@pytest.mark.slow
def test_a_cluster_that_is_gone_is_told_in_a_quarter_of_a_minute() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and not listening
        line, seconds = connect(RAY_ADDRESS=f"127.0.0.1:{closed.getsockname()[1]}")
    assert "cluster-unreachable" in line
    assert 10 < seconds < 60  # the rest is Ray's import on a busy machine


def test_a_store_that_starts_with_its_cluster_is_waited_for_and_elsewhere_or_for_ever_it_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([StorageError("store-unreachable", message="refused", remedy="wait")])

    def check() -> None:
        for error in answers:
            raise error

    monkeypatch.setattr("lungseg.cluster._LOOK_SECONDS", 0.01)
    monkeypatch.setattr(log("cluster").parent, "propagate", True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    await_store(check, minutes=1)  # whoever reads first is told
    assert caplog.messages == []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    await_store(check, minutes=1)
    assert set(caplog.messages) == {"waiting for the store, 0 s: refused"}

    def never() -> None:
        raise StorageError("store-unreachable", remedy="wait")

    def wrong() -> None:
        raise StorageError("store-refused", remedy="give the right key")

    with pytest.raises(StorageError, match="store-unreachable"):
        await_store(never, minutes=0.001)
    with pytest.raises(StorageError, match="store-refused"):
        await_store(wrong, minutes=1)


def test_a_head_that_comes_back_is_waited_for() -> None:
    with socket.socket() as head:
        head.bind(("0.0.0.0", 0))  # Ray asks by the machine's own address

        def listen() -> None:
            time.sleep(2)
            head.listen()

        thread = threading.Thread(target=listen)
        began = time.monotonic()
        thread.start()
        _wait_for_answer(f"127.0.0.1:{head.getsockname()[1]}")
        assert time.monotonic() - began > 1.5
        thread.join()


def test_a_folder_whose_paths_are_too_long_for_sockets_is_told_with_the_variable_to_set(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    line, _ = connect(TMPDIR=str(folder), RAY_ADDRESS="")
    assert "ray-folder" in line
    assert "RAY_TMPDIR" in line


@pytest.mark.slow
def test_a_local_ray_needs_no_home() -> None:
    """Nobody may write there, and nobody does."""
    line, _ = connect(HOME="/proc/nowhere", RAY_ADDRESS="")
    assert line == "1 node"


def test_nobody_else_in_the_network_reaches_a_local_ray(ray_cluster: object) -> None:
    """Of this process and all that it has started, the object store among them."""
    import psutil

    here = psutil.Process()
    heard = [
        connection.laddr.ip
        for process in (here, *here.children(recursive=True))
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(heard) > 5
    assert {address.removeprefix("::ffff:") for address in heard} == {"127.0.0.1"}


def test_a_ray_that_did_not_start_in_time_leaves_no_process() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    begun: list[subprocess.Popen[bytes]] = []

    @_whole_or_nothing()
    def start() -> None:
        begun.append(subprocess.Popen(sleep))
        raise RuntimeError

    with subprocess.Popen(sleep) as earlier:
        with pytest.raises(RuntimeError):
            start()
        assert begun[0].wait(30) == -signal.SIGKILL
        assert earlier.poll() is None
        earlier.kill()
