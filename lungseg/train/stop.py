"""Stopping a run: a signal to its command becomes a notice to its workers, who commit the step they are at.

The notice lies in the key-value store of Ray's head, by the number of the Ray job. Beside it stands whether
workers train: where none does, there is nothing to commit, and nobody to wait for.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lungseg.telemetry import log
from lungseg.train.notice import ask

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LOOK_SECONDS = 0.5
_Mark = Literal["stop", "training"]


def set_mark(mark: _Mark, trial: str = "") -> None:
    """For the whole Ray job, or for one trial of it."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_key(mark, trial), b"1", namespace="lungseg")


def clear_mark(mark: _Mark) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_key(mark), namespace="lungseg")


def is_marked(mark: _Mark, trial: str = "") -> bool:
    """False where Ray does not run."""
    from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_initialized

    return _internal_kv_initialized() and _internal_kv_exists(_key(mark, trial), namespace="lungseg")


def _key(mark: _Mark, trial: str = "") -> str:
    import ray

    return f"{mark}-{ray.get_runtime_context().get_job_id()}-{trial}"


@contextmanager
def unmarked() -> Iterator[None]:
    """No mark of this Ray job is left behind. Whoever handles signals in the block, afterwards does so no
    more. Ray must run."""
    before = [signal.getsignal(one) for one in _SIGNALS]
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for one, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(one, handler)
        clear_mark("stop")
        clear_mark("training")


def heed_signals(abort: Callable[[], Any]) -> None:
    """Make the next SIGINT or SIGTERM to this command a notice to its workers, or `abort` where none trains;
    one more then ends the command at once. For the main thread."""

    def stop(number: int, frame: Any) -> None:
        for one in _SIGNALS:
            signal.signal(one, signal.default_int_handler)
        set_mark("stop")
        if is_marked("training"):
            log("train").info("stopping: the workers commit the step they are at; a second time ends at once")
        else:
            abort()

    for one in _SIGNALS:
        signal.signal(one, stop)


def watch_for_stop() -> None:
    """Begin to look whether this worker's command was asked to stop, from a thread of its own."""
    threading.Thread(target=_watch, name="lungseg-stop", daemon=True).start()


def _watch() -> None:
    from ray.exceptions import RayError, RpcError

    while True:
        try:
            if is_marked("stop"):
                return ask()
        except (RayError, RpcError) as error:  # a head that is away may come back
            log("train").debug("cannot ask Ray's head whether to stop: %s", error)
        time.sleep(_LOOK_SECONDS)
