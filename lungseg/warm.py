"""Processes that begin with their imports done: a server imports once, and forks each worker that Ray starts.

A worker of Ray Train imports TensorFlow, Ray and pandas for some 15 s of a core. One that is forked from a
process that has them needs a tenth of a second, and shares their memory with its siblings. Ray starts its
workers by the command `executable`: this module, which hands arguments, environment and open files of the
worker to the server. Where none answers, the worker starts as it ever did.

The server itself does nothing but import: neither threads nor devices outlive a fork. Should an import have
opened a GPU nonetheless, nothing is forked from it.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import runpy
import secrets
import selectors
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from struct import Struct
from types import SimpleNamespace
from typing import Any, NoReturn

_MESSAGE_BYTES = 1 << 16
_WAITING = 128
_OOM_SCORE = "/proc/self/oom_score_adj"
# What Ray reads when it is imported, so that a server is of use to one job of one node.
_OF_RAY = ("RAY_JOB_ID", "RAY_RAYLET_PID")
_CREDENTIALS = Struct("3i")  # process, user, group
_GPUS = ("/dev/nvidia", "/dev/kfd", "/dev/dri")


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports and the tracing of graphs, which make many objects and drop few: the cycle collector looks
    through them all time and again, and takes about a seventh of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def server_name() -> str:
    """For a `Server`: nobody else has it."""
    return f"lungseg-warm-{secrets.token_hex(8)}"


def executable(name: str) -> str:
    """A shell's words that start a Python process by the server of that name, as Ray's `py_executable` wants
    them. A $NAME in it is the variable of that process's environment."""
    return f"{shlex.quote(sys.executable)} -m lungseg.warm {shlex.quote(name)}"


class Server:
    """A server that ends with this process, however that ends, or by `close`. It is of use to one Ray, whose
    start sets `taken`. Its socket has a name and no file, so that nothing is left of it; raises OSError where
    the name is taken."""

    def __init__(self, name: str) -> None:
        self.taken = False
        self.name = name
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(_address(name))
            listening.listen(_WAITING)
            # Nobody writes to this pipe: its end tells the server that this process has gone.
            gone, self._here = os.pipe()
            files = (listening.fileno(), gone)
            command = [sys.executable, "-m", "lungseg.warm", "--serve", *map(str, files)]
            self._process = subprocess.Popen(
                command, pass_fds=files, stdin=subprocess.DEVNULL, start_new_session=True
            )
            os.close(gone)

    def preload(self, first: str, with_ray: str) -> None:
        """Have two functions, each "module:function", called in the server for what they import: `first` now,
        and `with_ray` once Ray can be imported, which is when it starts its first worker, or now, where this
        is a worker of that Ray itself."""
        with suppress(OSError), _connected(self.name) as connection:
            connection.sendall(json.dumps({"preload": [first, with_ray]}).encode())

    def close(self) -> None:
        os.close(self._here)
        self._process.wait()


def _address(name: str) -> str:
    return f"\0{name}"


@contextmanager
def _connected(name: str) -> Iterator[socket.socket]:
    """Raises OSError where no server of this user answers."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(_address(os.path.expandvars(name)))
        if not _of_this_user(connection):
            raise PermissionError(name)
        yield connection


def _of_this_user(connection: socket.socket) -> bool:
    """A name without a file has no permissions: who is at the other end is asked of the kernel."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(peer)[1] == os.getuid())


@dataclass(frozen=True)
class _Start:
    """What makes a process: as execve would have it, with folder and the kernel's word on who dies first."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    oom_score: str


def start(name: str, arguments: list[str]) -> NoReturn:
    """Have the server of that name fork what this process was to become, then end: Ray is told the other's
    id by itself."""
    with open(_OOM_SCORE, encoding="ascii") as oom_score:
        start = _Start(arguments, dict(os.environ), os.getcwd(), oom_score.read())
    with suppress(OSError), _connected(name) as connection:
        socket.send_fds(connection, [b" "], [0, 1, 2])
        connection.sendall(json.dumps({"start": asdict(start)}).encode())
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1):
            os._exit(0)
    os.execv(sys.executable, [sys.executable, *arguments])


class _Forks:
    """What the server does, until the pipe `gone` ends."""

    def __init__(self, listening: socket.socket, gone: int) -> None:
        self._listening, self._gone, self._ready = listening, gone, selectors.DefaultSelector()
        self._of_ray: list[str | None] | None = None  # the job whose workers it forks, once there is one
        self._with_ray: list[str] = []

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for file in (self._listening, self._gone):
            self._ready.register(file, selectors.EVENT_READ)
        while self._gone not in {key.fd for key, _ in self._ready.select()}:
            connection, _ = self._listening.accept()
            with connection:
                if _of_this_user(connection):
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        message, files = _receive(connection)
        if "preload" in message:
            first, with_ray = message["preload"]
            self._import(first)
            self._with_ray.append(with_ray)
            if all(name in os.environ for name in _OF_RAY):
                self._import_ray(dict(os.environ))
        elif "start" in message:
            start = _Start(**message["start"])
            if self._knows(start):
                if os.fork() == 0:
                    for inherited in (self._ready, self._listening, connection):
                        inherited.close()
                    os.close(self._gone)
                    _become(start, files)
                with suppress(OSError):  # who asked may have been ended meanwhile
                    connection.sendall(b"1")
        for file in files:
            os.close(file)

    def _knows(self, start: _Start) -> bool:
        """Whether this process, with Ray as it is imported here, is right for that worker."""
        if self._of_ray is None or self._with_ray:
            self._import_ray(start.environment)
        return self._of_ray == _of_ray(start.environment) and not _holds_a_gpu()

    def _import_ray(self, environment: dict[str, str]) -> None:
        if self._of_ray is None:
            self._of_ray = _of_ray(environment)
            os.environ.update(environment)
            with uncollected():
                import ray._private.workers.default_worker  # noqa: F401

            _leave_ids_to_the_forks()
        while self._with_ray:
            self._import(self._with_ray.pop())

    def _import(self, function: str) -> None:
        module, _, name = function.partition(":")
        with uncollected():
            getattr(importlib.import_module(module), name)()
        gc.freeze()  # what the collector does not touch stays shared


def _of_ray(environment: dict[str, str]) -> list[str | None]:
    return [environment.get(name) for name in _OF_RAY]


def _holds_a_gpu() -> bool:
    """CUDA cannot be used in the fork of a process that has begun to use it."""
    for file in os.scandir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is closed by now
            if os.readlink(file.path).startswith(_GPUS):
                return True
    return False


def _leave_ids_to_the_forks() -> None:
    """Ray draws an id for each class of actors that a module defines. Its generator begins with the first
    draw. Were that here, all forks would go on with the same ids, and two tasks of one id end the actor that
    they meet in."""
    import ray.actor
    from ray._raylet import ActorClassID

    actors: Any = ray.actor
    actors.ActorClassID = SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    data, files, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
    while part := connection.recv(_MESSAGE_BYTES):
        data += part
    return (json.loads(data) if data.endswith(b"}") else {}), files


def _become(start: _Start, files: list[int]) -> NoReturn:
    """Go on as the process that was to be started."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()  # Ray ends what is left of a worker's process group
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    os.environ.clear()
    os.environ.update(start.environment)
    os.chdir(start.folder)
    with suppress(OSError), open(_OOM_SCORE, "w", encoding="ascii") as oom_score:
        oom_score.write(start.oom_score)
    # Its lines go where its own environment says, from its next line on.
    logging.getLogger("lungseg").handlers.clear()
    sys.argv = start.arguments
    runpy.run_path(start.arguments[0], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _Forks(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3])).serve()
    else:
        start(sys.argv[1], sys.argv[2:])
