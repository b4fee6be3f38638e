"""Which tests run side by side, when the suite is spread over processes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_GATE, _TURN = Path(__file__), Path(__file__).parents[1] / "conftest.py"
"""What is locked: no more than two files that are there, so that none is left behind."""


def group(item: pytest.Item) -> str:
    """Tests of one group run one after the other in one process, which so starts its Ray once, or what a
    file's own fixtures hold. There are two groups with a Ray, so that two cores have each their own. A test
    that nothing may disturb comes after those that do not mind."""
    if "ray_cluster" in getattr(item, "fixturenames", ()):
        return "ray-train" if item.path.parent.name in ("train", "tune") else "ray"
    return "alone" if is_alone(item) else item.path.stem


def is_alone(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Ray's tests begin, since they take longest; those that run alone end, when least waits for them."""
    return sorted(items, key=lambda item: (not group(item).startswith("ray"), is_alone(item)))


@contextmanager
def its_turn(alone: bool, gate_file: Path = _GATE, turn_file: Path = _TURN) -> Iterator[None]:
    """Shared by tests that run side by side, whichever process they are in; `alone` waits for all of them.

    Who waits to be alone holds the gate, so that nobody overtakes for ever.
    """
    with gate_file.open() as gate, turn_file.open() as turn:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        gate.close()
        yield
