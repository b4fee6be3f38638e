"""The suite's own order: what shares a process, and what runs while nothing else does."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from helpers.turns import group, its_turn


def test_xdist_heeds_the_groups(request: pytest.FixtureRequest) -> None:
    """It tells them by the end of a test's name, and some pairs of its and pytest's versions forget to."""
    spread = "PYTEST_XDIST_WORKER" in os.environ
    assert request.node.nodeid.endswith("@test_turns") == spread
    assert group(request.node) == "test_turns"


def test_who_is_alone_waits_for_all_and_is_not_overtaken(tmp_path: Path) -> None:
    files = tmp_path / "gate", tmp_path / "turn"
    for file in files:
        file.touch()
    order: list[str] = []

    def begin(name: str, alone: bool) -> threading.Thread:
        def run() -> None:
            with its_turn(alone, *files):
                order.append(f"{name} begins")
                time.sleep(0.1)
                order.append(f"{name} ends")

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(0.5)
        return thread

    with its_turn(False, *files):
        begin("beside", False)
        waiting = [begin("alone", True), begin("late", False)]
        assert order == ["beside begins", "beside ends"]
    for thread in waiting:
        thread.join()
    assert order[2:] == ["alone begins", "alone ends", "late begins", "late ends"]
