"""What a run says of itself while it works: progress for people, metrics for Prometheus, logs.

Nothing here ever gets patient data: callers pass counts, seconds and case ids.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter, Gauge, Histogram

from lungseg.errors import LungsegError

LABELS = ("run", "trial", "rank")
STEP_SECONDS = Histogram("lungseg_step_seconds", "One training step, all replicas", LABELS)
DATA_WAIT_SECONDS = Counter("lungseg_data_wait_seconds", "Time the step waited for patches", LABELS)
CHECKSUM_FAILURES = Counter("lungseg_checksum_failures", "Record batches that came with wrong bytes")
STREAM_PATCHES = Counter("lungseg_stream_patches", "Patches given to training and validation")
STREAM_BYTES = Counter("lungseg_stream_bytes", "Bytes of record batches that came from the store")
STREAM_GETS = Counter("lungseg_stream_gets", "Ranged GETs of record batches, repeated ones too")
STREAM_RETRIES = Counter("lungseg_stream_retries", "Ranged GETs that repeated one that had failed")
STREAM_HEDGES = Counter("lungseg_stream_hedges", "Second reads beside one that was slow")
CACHE_HITS = Counter("lungseg_cache_hits", "Record batches that the node's disk held")
CACHE_MISSES = Counter("lungseg_cache_misses", "Record batches that it did not hold")
QUEUE_DEPTH = Gauge("lungseg_stream_queue_depth", "Batches that lay ready when one was asked for")
STREAM_WAIT_SECONDS = Counter("lungseg_stream_wait_seconds", "Time for which an asked batch was not ready")
PATCHES = Counter("lungseg_patches", "Patches trained on by this worker", LABELS)
TRAIN_LOSS = Gauge("lungseg_train_loss", "Mean training loss of the last epoch", LABELS)
VAL_DICE = Gauge("lungseg_val_dice", "Dice over the validation patches of the last epoch", LABELS)

Progress = Callable[[int, int], None]


def log(name: str) -> logging.Logger:
    """A logger below "lungseg" that writes one line to standard error, or to the file LUNGSEG_LOG_FILE
    through which the workers of a local cluster speak to their driver."""
    root = logging.getLogger("lungseg")
    if not root.handlers:
        path = os.environ.get("LUNGSEG_LOG_FILE")
        handler = logging.FileHandler(path) if path else logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    return root.getChild(name.removeprefix("lungseg."))


def relay(path: str) -> Callable[[], None]:
    """Copy what is appended to a log file to standard error, from a daemon thread.

    Returns the function that ends this: it copies the rest and removes the file.
    """
    ended = threading.Event()

    def follow() -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            last = False
            while not last:
                last = ended.wait(0.2)  # asked before reading, so that nothing written till then is lost
                sys.stderr.write(file.read())
                sys.stderr.flush()

    thread = threading.Thread(target=follow, name="lungseg-log-relay", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join(timeout=5)
        os.unlink(path)

    return end


@contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """For the import of TensorFlow and its first look for devices.

    Its C++ then writes notices about CPU features and absent GPUs to file descriptor 2, below any logger
    and before any log level counts. They are dropped, unless the block fails for a reason that is not ours.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as notices:
        os.dup2(notices.fileno(), 2)
        shown = b""
        try:
            yield
        except LungsegError:
            raise
        except Exception:
            sys.stderr.flush()
            notices.seek(0)
            shown = notices.read()
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            os.write(2, shown)


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """A bar with an estimate on a terminal, and a line every few seconds in a log file.

    Yields `report(done, total)`.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    began = time.monotonic()
    last = began

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if not done or (done < total and now - last < 5):
            return
        last = now
        left = (now - began) / max(done, 1) * (total - done)
        print(
            f"{title}: {done}/{total}, {now - began:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    yield report
