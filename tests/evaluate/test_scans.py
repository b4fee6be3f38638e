"""Scans side by side in one process, and their turns with the network."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np

from lungseg.evaluate.kept import Turn
from lungseg.evaluate.scans import run_scans


@dataclass(frozen=True)
class Asking:
    """Asks about four windows, two at a time."""

    case_id: str
    asked: list[str]
    together: Barrier

    def run(self, turn: Turn) -> str:
        def network(volume_hu: np.ndarray) -> np.ndarray:
            self.together.wait(10)
            self.asked.append(self.case_id)
            return volume_hu

        with turn(network) as predict, ThreadPoolExecutor(2) as threads:
            list(threads.map(predict, [np.zeros(1)] * 4))
        return self.case_id


def test_a_scan_has_the_network_until_it_is_done_and_two_calls_at_a_time() -> None:
    asked: list[str] = []
    together = Barrier(2)
    tasks = [Asking(name, asked, together) for name in "abc"]
    found, broken = run_scans(tasks, lambda done, total: None, lambda case_id, error: None)
    assert (found, broken) == (["a", "b", "c"], [])
    turns = ["".join(asked[first : first + 4]) for first in range(0, 12, 4)]
    assert sorted(turns) == ["aaaa", "bbbb", "cccc"]
