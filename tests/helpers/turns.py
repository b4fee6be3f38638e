"""Which tests run side by side, when the suite is spread over processes."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def group(item: pytest.Item) -> str:
    """Tests of one group run one after the other in one process, which so starts its Ray once, or what a
    file's own fixtures hold. A test that nothing may disturb comes after those that do not mind."""
    uses_ray = "ray_cluster" in getattr(item, "fixturenames", ())
    if uses_ray:
        return "ray"
    return "alone" if item.get_closest_marker("alone") else item.path.stem


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Ray's tests begin, since they take longest; those that run alone end, when least waits for them."""

    def turn(item: pytest.Item) -> tuple[bool, bool]:
        alone = item.get_closest_marker("alone") is not None
        return (group(item) != "ray", alone)

    return sorted(items, key=turn)


@contextmanager
def its_turn(item: pytest.Item) -> Iterator[None]:
    """Holds a lock of all processes of this run of the suite: shared, or alone for a test marked so.

    Who waits to be alone holds the gate, so that nobody overtakes for ever.
    """
    run = getattr(item.config, "workerinput", {}).get("testrunuid")
    if run is None:  # one process: nobody else runs
        yield
        return
    folder = Path(tempfile.gettempdir())
    kind = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with (folder / f"{run}.turn").open("w") as turn:
        with (folder / f"{run}.gate").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(turn, kind)
        yield
