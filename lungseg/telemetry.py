"""What a run says of itself while it works: progress for people, metrics for Prometheus, logs.

Nothing here ever gets patient data: callers pass counts, seconds and case ids.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, Self, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from lungseg.errors import LungsegError
from lungseg.show import duration
from lungseg.warm import uncollected

WORKER_METRICS = CollectorRegistry()
"""What each process of a run counts for itself; on export it is labelled by run, trial and rank."""
GROUP_METRICS = CollectorRegistry()
"""What is counted for all workers of a run together; on export its rank is empty."""


def _counter(name: str, meaning: str, registry: CollectorRegistry = WORKER_METRICS) -> Counter:
    return Counter(f"lungseg_{name}", meaning, registry=registry)


def _gauge(name: str, meaning: str, registry: CollectorRegistry = WORKER_METRICS) -> Gauge:
    """NaN until it is set, and not exported then: a rank that does not validate has no Dice, not 0."""
    gauge = Gauge(f"lungseg_{name}", meaning, registry=registry)
    gauge.set(math.nan)
    return gauge


def _seconds(name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"lungseg_{name}_seconds", meaning, registry=WORKER_METRICS, buckets=buckets)


STEP_SECONDS = _seconds(
    "step",
    "One training step, the wait for its patches included",
    (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
)
DATA_WAIT_SECONDS = _counter("data_wait_seconds", "Time for which training steps waited for their patches")
PATCHES = _counter("patches", "Patches trained on by this worker")
TRAIN_LOSS = _gauge("train_loss", "Training loss of the step that was logged last")
VAL_DICE = _gauge("val_dice", "Dice over the validation patches after the last epoch; rank 0 only")
LEARNING_RATE = _gauge("learning_rate", "Learning rate of the step that was logged last")
GRADIENT_NORM = _gauge("gradient_norm", "Global gradient norm, before clipping, of the step logged last")
CHECKPOINT_SECONDS = _seconds(
    "checkpoint", "Writing one checkpoint to the store; rank 0 only", (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300)
)
CHECKPOINT_BYTES = _counter("checkpoint_bytes", "Bytes of committed checkpoints; rank 0 only")
RESTARTS = _counter("restarts", "Restarts of all workers after one had failed; rank empty", GROUP_METRICS)
MISSING_WORKERS = _gauge("missing_workers", "Workers that a run waits for; rank empty", GROUP_METRICS)
CHECKSUM_FAILURES = _counter("checksum_failures", "Record batches that came with wrong bytes")
STREAM_PATCHES = _counter("stream_patches", "Patches given to training and validation")
STREAM_BYTES = _counter("stream_bytes", "Bytes of record batches that came from the store")
STREAM_GETS = _counter("stream_gets", "Ranged GETs of record batches, repeated ones too")
STREAM_RETRIES = _counter("stream_retries", "Ranged GETs that repeated one that had failed")
STREAM_HEDGES = _counter("stream_hedges", "Second reads beside one that was slow")
STREAM_WAIT_SECONDS = _counter("stream_wait_seconds", "Time for which an asked batch was not ready")
QUEUE_DEPTH = _gauge("stream_queue_depth", "Batches that lay ready when one was asked for")
CACHE_HITS = _counter("cache_hits", "Record batches that the node's disk held")
CACHE_MISSES = _counter("cache_misses", "Record batches that it did not hold")

Progress = Callable[[int, int], None]


def count_step(seconds: float, waited_seconds: float, patches: int) -> None:
    """A training step of this worker: its wall time, what of it passed without patches, its own patches."""
    STEP_SECONDS.observe(seconds)
    DATA_WAIT_SECONDS.inc(waited_seconds)
    PATCHES.inc(patches)


def show_step(loss: float, learning_rate: float, gradient_norm: float | None = None) -> None:
    """What is fetched from the device every few steps only."""
    TRAIN_LOSS.set(loss)
    LEARNING_RATE.set(learning_rate)
    if gradient_norm is not None:
        GRADIENT_NORM.set(gradient_norm)


def count_checkpoint(seconds: float, size_bytes: int) -> None:
    CHECKPOINT_SECONDS.observe(seconds)
    CHECKPOINT_BYTES.inc(size_bytes)


def log(name: str) -> logging.Logger:
    """A logger below "lungseg" that writes one line to standard error, or to the file LUNGSEG_LOG_FILE
    through which the workers of a local cluster speak to their driver. LUNGSEG_LOG_LEVEL, which `-v` and
    `-q` set, holds for the workers too."""
    root = logging.getLogger("lungseg")
    if not root.handlers:
        path = os.environ.get("LUNGSEG_LOG_FILE")
        handler = logging.FileHandler(path, encoding="utf-8") if path else logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(os.environ.get("LUNGSEG_LOG_LEVEL") or logging.INFO)
        root.propagate = False
    return root.getChild(name.removeprefix("lungseg."))


def talks() -> bool:
    """Whether people want to read of progress, and not of warnings and results alone (`-q`)."""
    return log("wait").isEnabledFor(logging.INFO)


def log_wait(title: str, about_seconds: float) -> None:
    """A log line for a wait that ends with the next line, whoever of the workers writes it; `relay` shows
    a bar meanwhile."""
    log("wait").info("%s, about %.0f s", title, about_seconds)


_WAIT = re.compile(r"\S+ INFO lungseg\.wait: (?P<title>.+), about (?P<seconds>\d+) s\n")


class Relay:
    """Copies what is appended to a log file to standard error, from a daemon thread that `start` begins."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ended = threading.Event()
        self._passed = threading.Condition()
        self._passes = 0
        self._thread = threading.Thread(target=self._follow, name="lungseg-log-relay", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def catch_up(self) -> None:
        """Wait until everything is copied that the file holds now."""
        with self._passed:
            whole = self._passes + 2  # the pass under way may have read already
            self._passed.wait_for(lambda: self._passes >= whole or not self._thread.is_alive(), timeout=5)

    def end(self) -> None:
        """Copy the rest and remove the file."""
        self._ended.set()
        self._thread.join(timeout=5)
        os.unlink(self._path)

    def _follow(self) -> None:
        with open(self._path, encoding="utf-8", errors="replace") as file, ExitStack() as bar:
            last = False
            while not last:
                last = self._ended.wait(
                    0.2
                )  # asked before reading, so that nothing written till then is lost
                for line in file.readlines():
                    bar.close()
                    wait = _WAIT.fullmatch(line) if sys.stderr.isatty() else None
                    if wait:
                        bar.enter_context(_expected(wait["title"], int(wait["seconds"]), sys.stderr))
                    else:
                        sys.stderr.write(line)
                sys.stderr.flush()
                with self._passed:
                    self._passes += 1
                    self._passed.notify_all()


@contextmanager
def quiet_tensorflow(told: bool = True) -> Iterator[None]:
    """For the import of TensorFlow and its first look for devices.

    Its C++ then writes notices about CPU features and absent GPUs to file descriptor 2, below any logger
    and before any log level counts. They are dropped, unless the block fails for a reason that is not ours,
    or somebody asked for more log (`-v`).
    """
    if log("tensorflow").isEnabledFor(logging.DEBUG):
        with waiting("importing TensorFlow", 10), lean_keras():
            yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    with open(os.dup(2), "w", encoding="utf-8") as terminal, tempfile.TemporaryFile() as notices:
        os.dup2(notices.fileno(), 2)
        shown = b""
        try:
            with waiting("importing TensorFlow", 10, terminal) if told else nullcontext(), lean_keras():
                yield
        except LungsegError:
            raise
        except Exception:
            sys.stderr.flush()
            notices.seek(0)
            shown = notices.read()
            raise
        finally:
            os.dup2(terminal.fileno(), 2)
            os.write(2, shown)


@contextmanager
def lean_keras() -> Iterator[None]:
    """For the first import of Keras, which takes matplotlib, pandas and scikit-learn along wherever they are
    installed, for functions that nothing here calls. Whoever needs them imports them later."""
    modules: dict[str, Any] = sys.modules
    first = "keras" not in modules  # later blocks load networks, which do not stay
    absent = {"matplotlib", "pandas", "sklearn"} - modules.keys()
    modules.update(dict.fromkeys(absent))  # None: as if it were not installed
    try:
        with uncollected():
            yield
        if first:
            gc.freeze()  # modules stay: to look through them for cycles takes a quarter of a second each time
    finally:
        for name in absent:
            del modules[name]


@contextmanager
def waiting(title: str, about_seconds: float, stream: TextIO | None = None) -> Iterator[None]:
    """For a wait in which nothing can be counted: a bar that fills as experience has it on a terminal, else
    one line, which is written only when the wait has lasted two seconds."""
    stream = stream or sys.stderr
    if not talks():
        yield
    elif stream.isatty():
        with _expected(title, about_seconds, stream):
            yield
    else:
        with _later(2.0, f"{title}, about {about_seconds:.0f} s", stream):
            yield


@contextmanager
def _later(seconds: float, line: str, stream: TextIO) -> Iterator[threading.Timer]:
    """Write a line when the block has lasted so long; whoever cancels the timer keeps it from that."""
    timer = threading.Timer(seconds, print, (line,), {"file": stream, "flush": True})
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A bar with an estimate on a terminal, and a line every few seconds in a log file.

    Yields `report(done, total)`.
    """
    if not talks():
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich import progress as rich

        columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
        times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
        with rich.Progress(*columns, *times, console=_screen()) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        with _later(5.0, f"{title}: the first is under way", sys.stderr) as first:
            yield _lines(title, first)


def _lines(title: str, first: threading.Timer) -> Progress:
    last = began = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done:
            first.cancel()
        if not done or (done < total and now - last < 5):
            return
        last = now
        left = (now - began) / done * (total - done)
        spent = f"{title}: {done}/{total}, {duration(now - began)}, about {duration(left)} left"
        print(spent, file=sys.stderr, flush=True)

    return report


@cache
def _screen() -> Any:
    """The one console of all bars, so that one may stand above another."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _expected(title: str, about_seconds: float, stream: TextIO) -> Iterator[None]:
    """A bar that time fills, and that goes when the wait is over."""
    from rich import progress as rich
    from rich.console import Console
    from rich.progress_bar import ProgressBar

    class Clock(rich.BarColumn):
        def render(self, task: rich.Task) -> ProgressBar:
            spent = task.elapsed or 0.0
            return ProgressBar(about_seconds, spent, self.bar_width, pulse=spent > about_seconds)

    columns = (rich.TextColumn("{task.description}"), Clock(), rich.TimeElapsedColumn())
    console = _screen() if stream is sys.stderr else Console(file=stream)
    with rich.Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(f"{title}, about {about_seconds:.0f} s")
        yield
