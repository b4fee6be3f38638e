"""What is seen of a sweep on a terminal."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from lungseg.telemetry import log
from lungseg.tune.table import live
from lungseg.tune.trials import Trial

TRIALS = [
    Trial(0, "complete", {"model.width": 8}, 0, val_dice=0.25, seconds=90, curve={1: 0.1, 2: 0.25}),
    Trial(
        1,
        "complete",
        {"optimizer.power": 0.00123456},
        0,
        val_dice=0.5,
        seconds=60,
        scan_seconds=2.5,
        curve={1: 0.5},
    ),
    Trial(2, "fail", {}, 0, error="patch-shape"),
    Trial(3, "running", {"model.width": 16}, 0),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_what_runs_and_the_best_stand_below_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(log("tune").parent, "handlers", [logging.StreamHandler()])
    before, terminal = sys.stderr, Terminal()
    with live(terminal) as show:
        show(TRIALS)
        log("tune").info("trial %s begins", "0003")
        sys.stderr.write("half ")
        sys.stderr.write("a line\n")
        assert not sys.stderr.isatty()
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert sys.stderr is before
    assert re.search(r"trial 0003 begins *\n", said)
    assert "half a line\n" in said
    rows = [line.split() for line in said[said.rindex("trial  ") :].splitlines()[1:4]]
    assert rows == [
        ["0003", "running", "-", "-", "0", "0.0", "0", "model.width=16"],
        ["0001", "complete", "0.5000", "2.5", "1", "1.0", "0", "optimizer.power=0.00123"],
        ["0000", "complete", "0.2500", "-", "2", "1.5", "0", "model.width=8"],
    ]


def test_elsewhere_nothing_is_drawn() -> None:
    stream = io.StringIO()
    with live(stream) as show:
        show(TRIALS)
    assert stream.getvalue() == ""
