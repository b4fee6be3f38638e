"""progress.json: the last word of whoever trains a run, for people who ask from elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from lungseg.errors import LungsegError
from lungseg.storage import Store, keys, to_json
from lungseg.telemetry import log

BEAT_SECONDS = 15.0
Doing = Literal["starting", "training", "validating", "searching", "ended", "stopped", "failed"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `step` is of the epoch under way, which has `steps`; `told` a Unix time, renewed
    every BEAT_SECONDS while the writer lives; `claim` the number of its lease, one a start of the workers."""

    claim: int
    doing: Doing = "starting"
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_per_step: float | None = None
    left_seconds: float | None = None
    error: str = ""
    told: float = field(default_factory=time.time)

    @classmethod
    def read(cls, store: Store, root: str) -> Self | None:
        """None where nobody has trained yet, or with a version of lungseg that did not tell."""
        key = keys.progress(root)
        return cls(**store.get_json(key)) if store.exists(key) else None


class Heart:
    """Writes progress.json from a thread of its own, from `start` to `end`, and does what is to be done
    `beside` it. A store that is away costs it a beat, and training nothing."""

    def __init__(
        self, store: Store, root: str, claim: int, beside: Callable[[], None] = lambda: None
    ) -> None:
        self._store, self._root, self._beside = store, root, beside
        self._progress = Progress(claim)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lungseg-progress", daemon=True)

    def tell(self, **news: Any) -> None:
        """Fields of `Progress`; they are written with the next beat."""
        self._progress = replace(self._progress, **news)

    def start(self) -> None:
        self._thread.start()

    def end(self, doing: Doing, error: str = "") -> None:
        """Write the last word, unless somebody else has taken the run over, or the store does not answer."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        if self._thread.is_alive():
            return
        self.tell(doing=doing, error=error)
        self._write()

    @contextmanager
    def beating(self, doing: Doing) -> Iterator[None]:
        """From the begin of the block to its end, however it ends."""
        self.tell(doing=doing)
        self.start()
        try:
            yield
        except KeyboardInterrupt:
            self.end("stopped")
            raise
        except BaseException as error:
            stopped = isinstance(error, LungsegError) and error.code == "stopped"
            self.end("stopped" if stopped else "failed", "" if stopped else str(error))
            raise
        self.end("ended")

    def _beat(self) -> None:
        self._write()
        while not self._ended.wait(BEAT_SECONDS):
            self._write()
            with suppress(LungsegError):  # an epoch's end tells what is wrong with the store or the lease
                self._beside()

    def _write(self) -> None:
        try:
            if not self._store.exists(keys.claim(self._root, self._progress.claim + 1)):
                body = replace(self._progress, told=time.time())
                self._store.put(keys.progress(self._root), to_json(asdict(body)))
        except LungsegError as error:
            log("train").debug("progress is not told: %s", error)
