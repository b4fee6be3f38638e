"""Work side by side in processes."""

from __future__ import annotations

from helpers.threads import threads_of_numpy

from lungseg.sources.phantom.cores import on_all_cores


def test_each_process_has_one_core_and_so_has_numpy_in_it() -> None:
    """Whose threads wait for work by turning: with two on each of two cores all took twice as long."""
    found = list(on_all_cores(threads_of_numpy, [(), ()], 1))
    assert len(found) == 2
    assert found[0]
    assert {count for one in found for count in one} == {1}
