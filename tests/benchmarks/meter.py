"""What reading patches takes: time, CPU and memory of this process and all that it started."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np


class Meter:
    """Seconds, CPU and memory of this process and its descendants inside a `with` block, and a
    fingerprint of what `batch` was given. The clock stops at the last batch.

    Memory is sampled. It is PSS, so that pages which processes share count once; RSS without smaps_rollup.
    """

    def __init__(self, period_seconds: float = 0.05) -> None:
        self._period = period_seconds
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._seen: dict[tuple[int, int], float] = {}
        self.memory = "pss" if os.access("/proc/self/smaps_rollup", os.R_OK) else "rss"
        self.patches = self.fingerprint = 0
        self.seconds = self.first_batch_seconds = self.cpu_seconds = self.peak_mib = 0.0

    def __enter__(self) -> Self:
        self._waited_before, self.start_mib = self._look(), self._mib()
        self._seen_before = sum(self._seen.values())
        self._sampler.start()
        self._began = time.perf_counter()
        return self

    def batch(self, image: Any, mask: Any) -> None:
        """Count what has been delivered: image int16 and mask uint8, both [n, z, y, x]."""
        self.seconds = time.perf_counter() - self._began
        self.first_batch_seconds = self.first_batch_seconds or self.seconds
        image, mask = np.asarray(image), np.asarray(mask)
        if (image.dtype, mask.dtype, mask.shape) != (np.int16, np.uint8, image.shape) or image.ndim != 4:
            raise TypeError(f"not patches: {image.dtype} {image.shape}, {mask.dtype} {mask.shape}")
        few = (slice(None), *[slice(None, None, 16)] * 3)
        value = 31 * int(image[few].sum(dtype=np.int64)) + int(mask[few].sum(dtype=np.int64))
        self.fingerprint = (self.fingerprint + value) % (2**61 - 1)
        self.patches += len(image)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._sampler.join()
        # One sum loses a process that nobody waited for, the other what each used since the last look at
        # it. Neither can count too much, so the greater is the nearer.
        waited = self._look() - self._waited_before
        self.cpu_seconds += max(waited, sum(self._seen.values()) - self._seen_before)

    def report(self) -> dict[str, Any]:
        names = ("seconds", "first_batch_seconds", "cpu_seconds", "start_mib", "peak_mib")
        figures = {name: round(getattr(self, name), 3) for name in names}
        return {"patches": self.patches, **figures, "memory": self.memory, "fingerprint": self.fingerprint}

    def _look(self) -> float:
        tree = process_tree()
        self._pids = [pid for pid, _ in tree]
        self._seen.update({process: own for process, (own, _) in tree.items()})
        return sum(own + waited for own, waited in tree.values())

    def _sample(self) -> None:
        while True:
            began, cpu = time.perf_counter(), time.thread_time()
            self._look()
            self.peak_mib = max(self.peak_mib, self._mib())
            self.cpu_seconds -= time.thread_time() - cpu
            # For a PSS the kernel walks every page: of many large processes that would take a core from
            # what is measured, so the sampler rests nine times as long as it worked.
            if self._done.wait(max(self._period, 9 * (time.perf_counter() - began))):
                return

    def _mib(self) -> float:
        kib = 0
        for pid in self._pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):  # It has ended.
                if self.memory == "pss":
                    kib += int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0])
                else:
                    kib += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4
        return kib / 1024


def process_tree() -> dict[tuple[int, int], tuple[float, float]]:
    """CPU seconds of this process and its descendants, of each its own and of children it waited for.
    Keys are process id and start time, as ids are used again."""
    tick, processes = os.sysconf("SC_CLK_TCK"), {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            processes[int(pid)] = [int(field) for field in (fields[1], fields[19], *fields[11:15])]
    tree, pending = {}, [os.getpid()]
    while pending:
        pid = pending.pop()
        _, started, *cpu = processes[pid]
        tree[pid, started] = (sum(cpu[:2]) / tick, sum(cpu[2:]) / tick)
        pending += [child for child, (parent, *_) in processes.items() if parent == pid]
    return tree
