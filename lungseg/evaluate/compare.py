"""Runs against each other on the same scans: paired differences, tests, and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from lungseg.evaluate.bootstrap import (
    Interval,
    Patients,
    Statistic,
    by_patient,
    difference,
    holm,
    interval,
    rank_shares,
    resample,
    wilcoxon,
)


@dataclass(frozen=True)
class Figure:
    """A figure of all runs: its statistic of each, by name."""

    higher_is_better: bool
    of_runs: Mapping[str, Statistic]


@dataclass(frozen=True)
class Difference:
    """`b` minus `a`. `p` is Wilcoxon's over patients and `p_holm` the same, corrected for all tests of the
    comparison; both None where no patient has the figure in both runs."""

    figure: str
    a: str
    b: str
    difference: Interval
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class Comparison:
    """`values` and `ranks` are by figure and run; of ranks, the share of draws in which the run comes first,
    second and so on."""

    values: Mapping[str, Mapping[str, Interval]]
    differences: tuple[Difference, ...]
    ranks: Mapping[str, Mapping[str, Sequence[float]]]


def compare(figures: Mapping[str, Figure], patients: Patients, seed: int = 0) -> Comparison:
    """All pairs of runs in every figure, on one set of draws. `patients` are those of the scans, which are
    the same ones, in the same order, in all statistics."""
    weights = resample(patients, seed=seed)
    values, ranks, found = {}, {}, []
    for name, figure in figures.items():
        statistics = figure.of_runs
        values[name] = {run: interval(one, patients, weights) for run, one in statistics.items()}
        shares = rank_shares(list(statistics.values()), weights, figure.higher_is_better)
        ranks[name] = dict(zip(statistics, shares.tolist(), strict=True))
        alone = {run: by_patient(one, patients) for run, one in statistics.items()}
        for a, b in combinations(statistics, 2):
            apart = interval(difference(statistics[a], statistics[b]), patients, weights)
            found.append(Difference(name, a, b, apart, wilcoxon(alone[a], alone[b]), None))
    return Comparison(values, _corrected(found), ranks)


def _corrected(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    tested = [one.p for one in differences if one.p is not None]
    corrected = iter(holm(tested))
    return tuple(
        one if one.p is None else Difference(one.figure, one.a, one.b, one.difference, one.p, next(corrected))
        for one in differences
    )
