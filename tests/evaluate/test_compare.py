"""Comparisons of runs whose differences are known."""

from __future__ import annotations

import numpy as np
import pytest

from lungseg.evaluate.bootstrap import ratio
from lungseg.evaluate.compare import Figure, compare

PATIENTS = [number // 2 for number in range(40)]  # two scans each
RANDOM = np.random.default_rng(0)
HARD = RANDOM.uniform(0, 0.5, 40)


def runs(**gains: float) -> Figure:
    return Figure(
        True,
        {name: ratio(HARD + gain + RANDOM.normal(0, 0.01, 40), np.ones(40)) for name, gain in gains.items()},
    )


def test_a_run_that_is_better_everywhere_is_told_from_its_equals() -> None:
    found = compare({"dice": runs(first=0, same=0, better=0.1)}, PATIENTS)
    pairs = {(one.a, one.b): one for one in found.differences}
    assert list(pairs) == [("first", "same"), ("first", "better"), ("same", "better")]
    equal, better = pairs["first", "same"], pairs["first", "better"]
    assert equal.difference.low < 0 < equal.difference.high
    assert better.difference.value == pytest.approx(0.1, abs=0.01)
    assert better.difference.low > 0.08
    assert better.difference.patients == 20
    assert better.p < 0.001
    assert equal.p > 0.01
    # Three tests: the smallest p counts three times, the largest once.
    assert sorted(one.p_holm / one.p for one in pairs.values())[0] == pytest.approx(1)
    assert found.ranks["dice"]["better"] == [1, 0, 0]
    assert found.ranks["dice"]["first"][0] == 0
    # Alone, no run's interval shows what the pairs show: the scans differ more than the runs.
    single = found.values["dice"]
    assert single["first"].high > single["better"].low


def test_where_less_is_better_the_lower_run_comes_first() -> None:
    of_runs = {"quiet": ratio(np.ones(40), np.ones(40)), "loud": ratio(np.full(40, 3), np.ones(40))}
    found = compare({"false positives": Figure(False, of_runs)}, PATIENTS)
    assert found.ranks["false positives"] == {"quiet": [1, 0], "loud": [0, 1]}
    [one] = found.differences
    assert (one.difference.value, one.difference.low, one.difference.high) == (2, 2, 2)


def test_a_figure_that_no_patient_has_is_left_open() -> None:
    nothing = ratio(np.zeros(40), np.zeros(40))
    found = compare({"none": Figure(True, {"a": nothing, "b": nothing}), "dice": runs(a=0, b=0.1)}, PATIENTS)
    open_one, given = found.differences
    assert open_one.p is open_one.p_holm is open_one.difference.value is None
    assert given.p_holm == given.p
