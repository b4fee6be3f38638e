"""A notice to leave: SIGTERM to a worker's own process, which would otherwise end it at once, or that its
command was asked to stop."""

from __future__ import annotations

import ctypes
import signal
import socket
import threading

_asked = threading.Event()
_held: list[socket.socket] = []  # one that is collected is closed, and would wake nobody
_handlers: list[int] = []
_get, _set = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
_get.restype = _set.restype = ctypes.c_void_p
_get.argtypes, _set.argtypes = [ctypes.c_int], [ctypes.c_int, ctypes.c_void_p]


def heed_sigterm() -> None:
    """Make the next SIGTERM a notice, and any further one end the process. For the main thread.

    That thread runs Python only now and then, and Python's signal handlers with it. The byte that Python
    writes at once wherever a signal arrives is read by a thread of its own.
    """
    before = signal.getsignal(signal.SIGTERM)
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while signal.SIGTERM not in reading.recv(64):
            pass
        _asked.set()

    _held.append(writing)
    threading.Thread(target=wait, name="lungseg-notice", daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, before))
    _handlers.append(_get(signal.SIGTERM))


def heed_sigterm_again() -> None:
    """Once TensorFlow has met its peers: its coordination service puts a handler of its own in the place of
    Python's. For any thread; does nothing where nobody called `heed_sigterm`."""
    if _handlers:
        _set(signal.SIGTERM, _handlers[-1])


def ask() -> None:
    """As if a SIGTERM had come."""
    _asked.set()


def was_asked() -> bool:
    return _asked.is_set()
