"""Work on all cores of this machine, each in a process of its own."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

Result = TypeVar("Result")


def on_all_cores(
    work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], bytes_each: int
) -> Iterator[Result]:
    """What `work(*job)` gives, in the order of the jobs, which are drawn as they are worked off: as many at
    once as there are cores and half of the memory holds. Raises what `work` raises; then, or where the
    iterator is closed, what is under way is still done."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = max(1, min(len(os.sched_getaffinity(0)), memory // 2 // bytes_each))
    under_way: deque[Future[Result]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (work.__module__,))
    try:
        for job in jobs:
            under_way.append(pool.submit(work, *job))
            while len(under_way) > 2 * workers or (under_way and under_way[0].done()):
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(module: str) -> None:
    """Ctrl-C is the parent's; and as each core has a worker, NumPy's threads would be too many. Only those of
    libraries that are there already can be limited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_module(module)
    threadpool_limits(1)
