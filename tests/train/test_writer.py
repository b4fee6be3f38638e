"""Writing beside the training: in order, bounded, and with errors that nobody can miss."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from lungseg.train.writer import Writer


def test_tasks_run_in_order_one_at_a_time_and_all_before_the_block_ends() -> None:
    done: list[int] = []
    under_way = threading.Lock()

    def task(number: int) -> Callable[[], None]:
        def run() -> None:
            assert under_way.acquire(blocking=False)
            threading.Event().wait(0.002)
            done.append(number)
            under_way.release()

        return run

    with Writer() as writer:
        for number in range(20):
            writer.submit(task(number))
    assert done == list(range(20))


def test_one_task_may_wait_while_one_runs_and_a_third_is_held_back() -> None:
    go, submitted = threading.Event(), []

    def bring(writer: Writer) -> None:
        for number in range(3):
            writer.submit(go.wait)
            submitted.append(number)

    with Writer() as writer:
        bringer = threading.Thread(target=bring, args=(writer,))
        bringer.start()
        bringer.join(0.5)
        assert submitted == [0, 1]
        go.set()
        bringer.join()
        assert submitted == [0, 1, 2]


def fail() -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("then", ["submit", "wait", "leave", "fail too"])
def test_an_error_comes_out_at_the_next_chance_and_stops_what_follows(then: str) -> None:
    done: list[int] = []

    def block() -> None:
        with Writer() as writer:
            writer.submit(fail)
            writer._tasks.join()
            if then == "submit":
                writer.submit(lambda: done.append(1))
            elif then == "wait":
                writer.wait()
            elif then == "fail too":
                raise ValueError("of the block, and later")

    with pytest.raises(OSError, match="disk full"):
        block()
    assert done == []


def test_ctrl_c_is_not_hidden_by_an_error_of_writing() -> None:
    def block() -> None:
        with Writer() as writer:
            writer.submit(fail)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
