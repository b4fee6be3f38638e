"""Tiling: each voxel has a window, neighbours overlap as asked, and no window is larger than it must be."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lungseg.scan.tiling import tiles

MULTIPLES = st.integers(1, 12)


@settings(deadline=None)
@given(st.integers(1, 400), MULTIPLES, MULTIPLES, st.sampled_from([1, 4, 8, 16]), st.floats(0, 0.9))
def test_as_few_windows_as_of_the_largest_size_cover_a_volume_and_none_could_be_smaller(
    size: int, most: int, least: int, multiple: int, overlap: float
) -> None:
    (side,), corners = tiles([size], [most * multiple], [least * multiple], multiple, overlap)
    starts = [start for (start,) in corners]
    largest = min(most * multiple, max(1, size // multiple) * multiple)

    def needed(of: int) -> int:
        return 1 + max(0, math.ceil((size - of) / max(1, math.floor(of * (1 - overlap)))))

    assert starts[0] == 0
    assert starts[-1] == max(0, size - side)
    assert len(starts) == needed(largest)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= max(1, math.ceil(side * (1 - overlap)))).all()
    assert side % multiple == 0
    assert min(least * multiple, largest) <= side <= largest
    assert side == min(least * multiple, largest) or needed(side - multiple) > len(starts)


def test_the_lungs_of_a_chest_take_seven_tenths_of_the_voxels_that_as_many_windows_of_96_would() -> None:
    """Along 282, 200 and 282 voxels 4, 3 and 4 of them could cover 312, 240 and 312."""
    sides, corners = tiles([282, 200, 282], [96] * 3, [32] * 3, 8, 0.25)
    assert sides == (88, 80, 88)
    assert corners == list(itertools.product([0, 65, 129, 194], [0, 60, 120], [0, 65, 129, 194]))
