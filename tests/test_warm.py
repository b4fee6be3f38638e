"""Processes forked by a server that has their imports see what they would see if they were started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from lungseg.warm import Server

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
    found = Server("/tmp")
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
    found, told = started(server.executable, script, MARK="here")
    assert found["arguments"] == [str(script), "--flag", "two words"]
    assert (found["name"], found["folder"], found["mark"]) == ("__main__", str(script.parent), "here")
    assert found["alone"]
    assert found["ray"]
    assert told == "told\n"
    assert found["oom"] == Path("/proc/self/oom_score_adj").read_text()
    again, _ = started(server.executable, script)
    assert again["parent"] == found["parent"] != os.getpid()
    assert again["mark"] is None


def test_forks_give_their_tasks_ids_of_their_own(script: Path) -> None:
    script.write_text("import json, ray; print(json.dumps(ray.NodeID.from_random().hex()))")
    server = Server("/tmp")
    try:
        server.preload("lungseg.train.worker:import_tensorflow", "lungseg.train.worker:import_ray_train")
        first, second = (started(server.executable, script)[0] for _ in range(2))
    finally:
        server.close()
    assert first != second


def test_ray_is_imported_for_one_job_and_workers_of_another_start_anew(server: Server, script: Path) -> None:
    assert started(server.executable, script)[0]["ray"]
    found, told = started(server.executable, script, RAY_JOB_ID="02000000")
    assert (found["parent"], found["ray"]) == (os.getpid(), False)
    assert told == "told\n"


def test_without_a_server_a_process_starts_as_ever(script: Path) -> None:
    gone = Server("/tmp")
    gone.close()
    found, _ = started(gone.executable, script)
    assert (found["parent"], found["ray"]) == (os.getpid(), False)
    assert found["arguments"] == [str(script), "--flag", "two words"]


def test_a_server_ends_with_whoever_began_it_even_by_a_kill_and_leaves_nothing() -> None:
    code = "import sys; from lungseg.warm import Server; server = Server(sys.argv[1]); "
    code += "print(server._process.pid, flush=True); input()"
    with TemporaryDirectory(dir="/tmp") as folder:  # a socket's path is to be short
        command = [sys.executable, "-c", code, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as begun:
            assert begun.stdout is not None
            pid = int(begun.stdout.readline())
            assert os.listdir(folder)
            os.kill(begun.pid, signal.SIGKILL)
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists()
        assert not os.listdir(folder)


def test_the_workers_of_a_local_ray_begin_with_what_was_imported_for_them(ray_cluster: Any) -> None:
    from lungseg.cluster import warm_up
    from lungseg.train.worker import IMPORTS

    warm_up(*IMPORTS)

    @ray_cluster.remote
    class Worker:
        def modules(self) -> list[str]:
            return list(sys.modules)

    assert {"tensorflow", "ray.train", "lungseg.train.loop"} <= set(
        ray_cluster.get(Worker.remote().modules.remote())
    )
