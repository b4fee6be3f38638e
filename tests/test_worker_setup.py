"""A local Ray's workers are forked from our server without Ray's setup of them, which has all else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lungseg.warm import Server, executable, server_name
from lungseg.worker_setup import ARGUMENT

SCRIPT = """
import json, os, sys
print(json.dumps(dict(arguments=sys.argv[1:], mark=os.environ.get("MARK"), parent=os.getppid())), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server(server_name())
    yield found
    found.close()


def started(folder: Path, *of_ray: str) -> dict[str, Any]:
    """What a worker saw that was started as Ray has it, with these arguments of its setup."""
    script = folder / "worker.py"
    script.write_text(SCRIPT)
    command = [sys.executable, ARGUMENT, str(script), "--flag", "two words", *of_ray]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, timeout=100, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["arguments"] == ["--flag", "two words"]
    return found


def setup(py_executable: str, **more: Any) -> list[str]:
    from ray._private.runtime_env.context import RuntimeEnvContext

    context = RuntimeEnvContext(py_executable=py_executable, **more)
    return ["--language=PYTHON", f"--serialized-runtime-env-context={context.serialize()}"]


def test_a_worker_comes_from_the_server_that_its_context_names(tmp_path: Path, server: Server) -> None:
    found = started(tmp_path, *setup(executable(server.name), env_vars={"MARK": "here"}))
    assert (found["parent"], found["mark"]) == (server._process.pid, "here")


@pytest.mark.parametrize(
    "more", [{"command_prefix": ["MARK=here"]}, {"env_vars": {"MARK": "${SHORT}here", "SHORT": ""}}]
)
def test_what_else_a_context_asks_for_is_left_to_ray(
    tmp_path: Path, server: Server, more: dict[str, Any]
) -> None:
    assert started(tmp_path, *setup(executable(server.name), **more))["mark"] == "here"


def test_another_python_is_left_to_ray(tmp_path: Path) -> None:
    found = started(tmp_path, *setup(sys.executable))
    assert found["parent"] == os.getpid()


def test_without_a_context_a_worker_starts_at_once(tmp_path: Path) -> None:
    assert started(tmp_path)["parent"] == os.getpid()


def test_a_local_ray_starts_its_workers_so_and_no_process_that_only_clusters_need(ray_cluster: Any) -> None:
    def parent() -> str:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text()

    assert "lungseg.warm\0--serve" in ray_cluster.get(ray_cluster.remote(parent).remote())
    session = Path(ray_cluster._private.worker._global_node.get_session_dir_path()).name
    commands = [
        path.read_bytes().decode(errors="replace")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    ]
    ours = [command for command in commands if session in command]
    assert any("raylet" in command for command in ours)
    for name in ("monitor.py", "dashboard/dashboard.py", "log_monitor.py"):
        assert not any(name in command for command in ours)
