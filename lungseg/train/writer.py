"""Writing beside the training: one thread that does what it is given, in order, one at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Self


class Writer:
    """Use it in a `with` block, which ends when all is written.

    While one task runs, a second may wait; whoever brings a third waits for the first. None is ever replaced
    by a newer one: which epochs are committed must not depend on how fast the store is, and a few copies of
    the weights are all the memory that it may cost.

    After a task has failed the rest are dropped, and its error is raised by the next call and at the end of
    the block, where it comes before an error of the block's own, which is later.
    """

    def __init__(self) -> None:
        self._tasks: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._run, name="lungseg-writer", daemon=True)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._tasks.put(None)
        self._thread.join()
        if self._error and self._error is not error and (error is None or isinstance(error, Exception)):
            raise self._error from error

    def submit(self, task: Callable[[], object]) -> None:
        """Raises what an earlier task raised."""
        self._raise()
        self._tasks.put(task)

    def wait(self) -> None:
        """Until all tasks are done. Raises what one of them raised."""
        self._tasks.join()
        self._raise()

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if not self._error:
                    task()
            except BaseException as error:
                self._error = error
            finally:
                self._tasks.task_done()
