"""Processes forked by a server that has their imports see what they would see if they were started anew."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lungseg import warm
from lungseg.warm import Server, executable, server_name

SCRIPT = """
import json, os, sys
found = dict(arguments=sys.argv, name=__name__, folder=os.getcwd(), mark=os.environ.get("MARK"),
             parent=os.getppid(), alone=os.getpgid(0) == os.getpid(), ray="ray" in sys.modules,
             oom=open("/proc/self/oom_score_adj").read())
print(json.dumps(found), flush=True)
print("told", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server(server_name())
    yield found
    found.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    return path


def started(executable: str, script: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """What the script printed, and what it told on standard error."""
    command = f"exec {executable} {script} --flag 'two words'"
    ran = subprocess.Popen(
        ["bash", "-c", command], env={**os.environ, **environment}, cwd=script.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, told = ran.communicate(timeout=100)
    return json.loads(out), told


def test_a_forked_process_is_as_one_that_was_started(server: Server, script: Path) -> None:
    found, told = started(executable(server.name), script, MARK="here")
    assert found["arguments"] == [str(script), "--flag", "two words"]
    assert (found["name"], found["folder"], found["mark"]) == ("__main__", str(script.parent), "here")
    assert found["alone"]
    assert found["ray"]
    assert told == "told\n"
    assert found["oom"] == Path("/proc/self/oom_score_adj").read_text()
    again, _ = started(executable(server.name), script)
    assert again["parent"] == found["parent"] != os.getpid()
    assert again["mark"] is None


def test_forks_give_their_tasks_ids_of_their_own(script: Path) -> None:
    script.write_text("import json, ray; print(json.dumps(ray.NodeID.from_random().hex()))")
    server = Server(server_name())
    try:
        server.preload("lungseg.train.worker:import_tensorflow", "lungseg.train.worker:import_ray_train")
        first, second = (started(executable(server.name), script)[0] for _ in range(2))
    finally:
        server.close()
    assert first != second


def test_ray_is_imported_for_one_job_and_workers_of_another_start_anew(server: Server, script: Path) -> None:
    assert started(executable(server.name), script)[0]["ray"]
    found, told = started(executable(server.name), script, RAY_JOB_ID="02000000")
    assert (found["parent"], found["ray"]) == (os.getpid(), False)
    assert told == "told\n"


def test_from_a_process_that_has_opened_a_gpu_nothing_is_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands for the device, which is not here."""
    monkeypatch.setattr(warm, "_GPUS", (str(tmp_path / "nvidia"),))
    start = warm._Start([], {}, "/", "0")
    with socket.socket() as listening:
        forks = warm._Forks(listening, 0)
        forks._of_ray = [None, None]
        assert forks._knows(start)
        with open(tmp_path / "nvidia0", "w"):
            assert not forks._knows(start)
        assert forks._knows(start)


def test_without_a_server_a_process_starts_as_ever(script: Path) -> None:
    gone = Server(server_name())
    gone.close()
    found, _ = started(executable(gone.name), script)
    assert (found["parent"], found["ray"]) == (os.getpid(), False)
    assert found["arguments"] == [str(script), "--flag", "two words"]


def test_a_server_ends_with_whoever_began_it_even_by_a_kill() -> None:
    code = "from lungseg.warm import Server, server_name; server = Server(server_name()); "
    code += "print(server._process.pid, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as begun:
        assert begun.stdout is not None
        pid = int(begun.stdout.readline())
        os.kill(begun.pid, signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_cycle_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    with suppress(KeyError), warm.uncollected():
        assert not gc.isenabled()
        raise KeyError
    after = gc.isenabled()
    (gc.enable if before else gc.disable)()
    assert after == enabled


def test_strangers_are_neither_served_nor_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user where this one may become it; and another id for our own."""
    if os.getuid() == 0 and (child := os.fork()) == 0:
        os.setuid(65534)
        with suppress(Exception), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(warm._address(server.name))
            os._exit(len(connection.recv(1)))
        os._exit(2)
    elif os.getuid() == 0:
        assert os.waitpid(child, 0)[1] == 0
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(PermissionError), warm._connected(server.name):
        pass


def test_the_workers_of_a_local_ray_begin_with_what_was_imported_for_them(ray_cluster: Any) -> None:
    from lungseg.cluster import warm_up
    from lungseg.train.worker import IMPORTS

    warm_up(*IMPORTS)

    @ray_cluster.remote
    class Worker:
        def modules(self) -> list[str]:
            return list(sys.modules)

    # Not one of the processes that wait for their next task.
    worker = Worker.options(runtime_env={"env_vars": {"MARK": "new"}}).remote()
    assert {"tensorflow", "ray.train", "lungseg.train.loop"} <= set(ray_cluster.get(worker.modules.remote()))
