"""A notice to leave: SIGTERM to a worker's own process, which would otherwise end it at once."""

from __future__ import annotations

import signal
import threading

_asked = threading.Event()


def heed_sigterm() -> None:
    """Make the next SIGTERM a notice, and any further one end the process. For the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def note(*_: object) -> None:
        _asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)


def was_asked() -> bool:
    return _asked.is_set()
